"""Records what prepared data were made of, and tells which part of it has changed.

axolotl names a folder of prepared data after the recipe alone. Under `rl: edpo` the
name also depends on the contents of files, on the chat template and on the tokenizer.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from ..errors import as_yaml

# Raised when the same recipe makes other texts than before.
FORMAT = 1
FILE = "edpo_made_of.json"
BLOCK = 1 << 24
CONTENTS = "the contents of"

# Keys of the recipe that change the pairs, apart from the entries.
KEYS = (
    "sequence_len",
    "excess_length_strategy",
    "chat_template_kwargs",
    "dataset_exact_deduplication",
    "shuffle_merged_datasets",
    "shuffle_before_merging_datasets",
    "seed",
    "special_tokens",
    "tokens",
    "added_tokens_overrides",
)
# Keys that change the images.
IMAGE_KEYS = ("image_size", "image_resize_algorithm", "processor_kwargs")


def made_of(
    cfg: Any,
    entries: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    template: str,
    processor: Any,
) -> dict[str, str]:
    """All that prepared data depend on: name of a part -> its value or digest.

    Args:
        cfg: axolotl's config.
        entries: The entries of `datasets:` or of `test_datasets:`.
        tokenizer: A tokenizer of transformers.
        template: The chat template; "" without one.
        processor: The processor of a vision-language model; None for a text model.
    """
    parts = {
        "axolotl": version("axolotl"),
        "format of axolotl-edpo": str(FORMAT),
        "the tokenizer": _digest(_tokenizer_text(tokenizer).encode()),
        "the chat template": _digest(template.encode()),
    }
    parts |= {f"`{key}`": as_yaml(cfg.get(key)) for key in KEYS}
    if processor is not None:
        parts["the processor"] = _digest(_processor_text(processor).encode())
        parts |= {f"`{key}`": as_yaml(cfg.get(key)) for key in IMAGE_KEYS}
    for number, entry in enumerate(entries):
        parts[f"entry {number}"] = json.dumps(entry, sort_keys=True, default=str)
        for file in _files(entry):
            parts[f"{CONTENTS} `{file}`"] = _digest_of_file(file)
    return parts


def folder_name(root: Path, parts: Mapping[str, str]) -> str:
    """The name of the folder of data that are made of these parts.

    If the data files are not on this machine, as after `axolotl preprocess` on another
    one, it is the newest folder that differs in nothing else.
    """
    if not any(map(_is_contents, parts)):
        for file in _newest_first(root):
            before = json.loads(file.read_text())
            if dict(parts) == {k: v for k, v in before.items() if not _is_contents(k)}:
                return file.parent.name
    return _digest(json.dumps(parts, sort_keys=True).encode())


def write(folder: Path, parts: Mapping[str, str]) -> None:
    """Writes beside prepared data what they were made of."""
    if folder.is_dir():
        (folder / FILE).write_text(json.dumps(parts, indent=1, sort_keys=True))


def changes(folder: Path, parts: Mapping[str, str]) -> list[str]:
    """What differs from the data that were last prepared of the same entries.

    Args:
        folder: `dataset_prepared_path`.
        parts: What the data are made of now.

    Returns:
        Names of parts; empty if nothing was prepared of these entries.
    """
    for file in _newest_first(folder):
        before = json.loads(file.read_text())
        if _entries(before) == _entries(parts):
            names = sorted(before.keys() | parts.keys())
            return [name for name in names if before.get(name) != parts.get(name)]
    return []


def _newest_first(root: Path) -> list[Path]:
    files = root.glob(f"*/{FILE}")
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)


def _is_contents(name: str) -> bool:
    return name.startswith(CONTENTS)


def _entries(parts: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in parts.items() if name.startswith("entry ")}


def _tokenizer_text(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else as_yaml(sorted(tokenizer.get_vocab()))
    return vocabulary + as_yaml(dict(tokenizer.special_tokens_map))


def _processor_text(processor: Any) -> str:
    settings = {**processor.to_dict(), "images": processor.image_processor.to_dict()}
    text = json.dumps(settings, sort_keys=True, default=str)
    return text + str(processor.chat_template)


def _files(entry: Mapping[str, Any]) -> list[Path]:
    """The local files of an entry; none if its data are on a hub."""
    path = Path(str(entry["path"]))
    named = entry.get("data_files") or []
    named = [named] if isinstance(named, str) else named
    inside = [path / name for name in named if (path / name).is_file()]
    if inside or path.is_file():
        return inside or [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _digest_of_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
