"""Every type of preference data and every option of `datasets:`, against `rl: dpo`.

The same recipe is loaded under `rl: edpo` and under `rl: dpo`, each by axolotl: the
prepared pairs must be equal, and so must tokens and scored tokens of the first
optimizer step as each trainer lays it.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import axolotl.prompt_strategies.dpo as shipped
import matrix
import pytest
import tiny
import torch
from datasets import Dataset, disable_caching, enable_caching
from matrix import Cell

from axolotl_edpo.batch import Completions, completions_of

TITLE = "Data sets"
INTRO = """
"Works" means: the pairs that axolotl prepares, and the tokens and scored tokens of the
first optimizer step, are those of the same recipe with `rl: dpo`.
"""

# system, question, chosen, rejected
TALKS = [
    ("", "Is red a colour?", "It is.", "Red is a number."),
    ("Be brief.", "Cats?", "They sleep.", "Cats sleep for most of the day."),
    ("", "And dogs?", "Dogs run.\nThen they sleep.", "No."),
    ("Be kind.", "Grüße, was ist das? 你好", "Ein Gruß. 你好!", "Nichts."),
    ("", "What is two and two?", "Four.", "Five, or so they say."),
    ("Be sure.", "Why?", "Because.", "I do not know why."),
    ("", "Where do you live?", "Here.", "There, and sometimes elsewhere."),
    ("", "When is today?", "Today is today, and not tomorrow.", "Now."),
    ("Be fast.", "Blue?", "Yes.", "No, never."),
    ("", "Small or big?", "Small, as you can see.", "Big."),
]


def rows(make: Callable[..., dict]) -> list[dict]:
    """A row of data for each of TALKS."""
    return [make(*talk) for talk in TALKS]


def turns(*texts: str, **names: str) -> list[dict]:
    """Messages of user and assistant in turn."""
    role, content = names.get("role", "role"), names.get("content", "content")
    roles = [names.get("user", "user"), names.get("assistant", "assistant")]
    return [{role: roles[i % 2], content: text} for i, text in enumerate(texts)]


def plain(prompt="prompt", chosen="chosen", rejected="rejected") -> list[dict]:
    """Columns of text."""
    return rows(lambda s, q, c, r: {"system": s, prompt: q, chosen: c, rejected: r})


TEXT = plain()
TALK = rows(lambda s, q, c, r: {"chosen": turns(q, c), "rejected": turns(q, r)})
ULTRA = [
    {"system": text["system"], "prompt": text["prompt"], **talk}
    for text, talk in zip(TEXT, TALK, strict=True)
]
MESSAGES = rows(
    lambda s, q, c, r: {
        "messages": turns(q), "chosen": turns(c, c)[1], "rejected": turns(r, r)[1]
    }
)
RANKED = rows(
    lambda s, q, c, r: {
        "prompt": q,
        "answers": [{"answer": c, "rank": 3}, {"answer": r, "rank": 2}],
    }
)
CUSTOM = """
def shout(cfg, **kwargs):
    def transform_fn(sample):
        return {
            "prompt": sample["q"].upper() + "\\n",
            "chosen": sample["yes"],
            "rejected": sample["no"],
        }
    return transform_fn, {"remove_columns": ["q", "yes", "no"]}
"""


@dataclass(frozen=True)
class Data(Cell):
    """A cell with data.

    Attributes:
        files: Rows of each file that the recipe reads.
        options: What the entry of `datasets:` has beside path and type.
        ours: Keys for `rl: edpo` alone.
        first: What the first chosen sequence reads.
        pairs: How many pairs are trained on.
        trains: Whether the recipe is also trained.
    """

    files: Mapping[str, list[dict]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    first: str = ""
    pairs: int = len(TALKS)
    trains: bool = False


@dataclass(frozen=True)
class Type(Data):
    """A cell of a type that axolotl ships, with the type's rows."""

    type: Any = ""


def chatml(name: str, data: list[dict]) -> Type:
    text = "<|im_start|>user\nIs red a colour?<|im_end|>\n<|im_start|>assistant\n"
    return _typed(f"chatml.{name}", data, text + "It is.<|im_end|>")


def llama3(name: str, data: list[dict]) -> Type:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = head.format("user") + "Is red a colour?<|eot_id|>" + head.format("assistant")
    return _typed(f"llama3.{name}", data, text + "It is.<|eot_id|>")


def _typed(type: str, data: list[dict], text: str, **more) -> Type:
    first = text + "</s>"
    return Type(f"`{type}`", type=type, files={"a.jsonl": data}, first=first, **more)


OWN_CHAT = "[user]Is red a colour?</s>[assistant]It is."
TYPES = [
    _typed("chat_template.default", MESSAGES, OWN_CHAT, trains=True),
    _typed("chat_template.argilla_chat", TALK, OWN_CHAT),
    *(
        make(name, data)
        for make in (chatml, llama3)
        for name, data in {
            "default": plain("instruction", "chosen_response", "rejected_response"),
            "argilla_chat": TALK,
            "icr": plain("input"),
            "intel": plain("question"),
            "prompt_pairs": TEXT,
            "ultra": ULTRA,
        }.items()
    ),
    _typed(
        "zephyr.nectar",
        RANKED,
        "<|system|>\n</s>\n<|user|>\nIs red a colour?</s>\n<|assistant|>\nIt is.",
    ),
    _typed("passthrough.default", TEXT, "Is red a colour?It is."),
    Type(
        "`type:` with `field_*` and `*_format` (`user_defined.default`)",
        type="user_defined.default",
        files={"a.jsonl": plain("q", "yes", "no")},
        options={
            "type": {
                "field_prompt": "q",
                "field_chosen": "yes",
                "field_rejected": "no",
                "field_system": "system",
                "prompt_format": "{system}Q: {prompt}\nA:",
                "chosen_format": " {chosen}!",
                "rejected_format": " {rejected}?",
            }
        },
        first="Q: Is red a colour?\nA: It is.!</s>",
    ),
]
CELLS = [*TYPES]


# --- comparing -------------------------------------------------------------------


def paths(batch: Mapping[str, Any]) -> list[list[int]]:
    """Where in the rows of our batch the tokens of each sequence are."""
    if "segments" not in batch:
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [[*range(i * width, i * width + n)] for i, n in enumerate(lengths)]
    pieces, start = [], 0
    for length in batch["segments"].pieces:
        pieces.append([*range(start, start + length)])
        start += length
    found = [sum((pieces[k] for k in keys), []) for keys in batch["segments"].keys]
    return found[::2] + found[1::2]  # a pair's two follow each other in the row


def sequences(batch: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens of each sequence, and the indices of those that are scored.

    Args:
        batch: TRL's, or ours of any layout.
    """
    if "completion_mask" in batch:
        masks = zip(batch["attention_mask"], batch["completion_mask"], strict=True)
        return [
            (ids[real.bool()].tolist(), scored.nonzero()[:, 0].tolist())
            for ids, (real, scored) in zip(batch["input_ids"], masks, strict=True)
        ]
    tokens, done = batch["input_ids"].flatten(), completions_of(batch)
    found = []
    scored = zip(*(v.split(done.lengths.tolist()) for v in done[:2]), strict=True)
    for path, (positions, targets) in zip(paths(batch), scored, strict=True):
        after = [path.index(position) + 1 for position in positions.tolist()]
        ids = tokens[path].tolist()
        assert [ids[i] for i in after] == targets.tolist()
        found.append((ids, after))
    return found


def pairs_of(batches: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Chosen and rejected of each pair, as `sequences` gives them."""
    pairs = []
    for batch in batches:
        both = sequences(batch)
        half = len(both) // 2
        pairs += zip(both[:half], both[half:], strict=True)
    return pairs


def first_step(trainer) -> list[Mapping[str, Any]]:
    """The micro-batches of the first optimizer step, as the trainer lays them."""
    loader = iter(trainer.get_train_dataloader())
    count = trainer.args.gradient_accumulation_steps
    return trainer.get_batch_samples(loader, count, torch.device("cpu"))[0]


def assert_same_pairs(ours, dpo) -> None:
    """Prepared data and first step are those of `rl: dpo`.

    Args:
        ours: An `EDPOTrainer`.
        dpo: axolotl's trainer.
    """
    assert ours.train_dataset.to_list() == dpo.train_dataset.to_list()
    assert (ours.eval_dataset is None) == (dpo.eval_dataset is None)
    if dpo.eval_dataset is not None:
        assert ours.eval_dataset.to_list() == dpo.eval_dataset.to_list()
    mine, theirs = first_step(ours), first_step(dpo)
    if ours.rows.deals:
        assert sorted(pairs_of(mine)) == sorted(pairs_of(theirs))
        return
    assert pairs_of(mine) == pairs_of(theirs)
    if not ours.rows.packs:
        for a, b in zip(mine, theirs, strict=True):
            for name in ("input_ids", "attention_mask"):
                assert torch.equal(a[name], b[name])


# --- running ---------------------------------------------------------------------

WRITERS = {
    ".jsonl": Dataset.to_json,
    ".parquet": Dataset.to_parquet,
    ".csv": Dataset.to_csv,
    "": Dataset.save_to_disk,
}
DPO = dict(rl="dpo", rl_beta=0.1, plugins=None, beta=None, edpo_epsilon=None)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Recipes name files of the current folder; nothing is taken from a cache."""
    monkeypatch.chdir(tmp_path)
    disable_caching()
    yield
    enable_caching()


def write(files: Mapping[str, list[dict]]) -> None:
    for name, data in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        WRITERS[Path(name).suffix](Dataset.from_list(data), name)


def keys_of(cell: Data, recipe: Callable[..., dict]) -> dict:
    """The cell's recipe; processes of one's own for tiny data would take seconds."""
    entry = {"path": next(iter(cell.files)), "type": getattr(cell, "type", None)}
    base = dict(
        datasets=[{**entry, **cell.options}],
        dataset_num_proc=0,
        skip_prepare_dataset=True,
        shuffle_merged_datasets=False,
        sequence_len=512,
    )
    return recipe(**{**base, **cell.keys})


@matrix.cells(CELLS)
def test_the_pairs_are_those_of_dpo(cell, recipe, tmp_path):
    write(cell.files)
    keys = keys_of(cell, recipe)
    ours = (matrix.assert_cell if cell.trains else _built)(cell, tmp_path, {**keys, **cell.ours})
    dpo = tiny.build(tmp_path, {**keys, **DPO})
    assert_same_pairs(ours, dpo)
    assert len(ours.train_dataset) == cell.pairs
    first = ours.train_dataset[0]
    text = ours.processing_class.decode(first["prompt_ids"] + first["chosen_ids"])
    assert text == cell.first


def _built(cell, folder, keys):
    return tiny.build(folder, keys)


def test_every_type_that_axolotl_ships_has_a_cell():
    found = set()
    for module in pkgutil.iter_modules(shipped.__path__, shipped.__name__ + "."):
        own = importlib.import_module(module.name)
        for name, thing in inspect.getmembers(own, inspect.isfunction):
            if thing.__module__ == own.__name__:
                found.add(f"{module.name.rpartition('.')[2]}.{name}")
    assert found == {cell.type for cell in TYPES}
