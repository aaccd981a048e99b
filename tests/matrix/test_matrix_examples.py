"""Every `rl: dpo` recipe that axolotl publishes, with the word changed and two keys.

The recipes come from the source distribution of the axolotl that is installed: pip gets
it once, into pytest's cache. A test compares the cells with what is found there.
"""

import importlib.metadata
import json
import math
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.integrations.base import PluginManager
from filelock import FileLock
from helpers import matrix, tiny
from helpers.matrix import Cell
from helpers.tiers import rest
from jsonschema.validators import Draft202012Validator

from axolotl_edpo.config.json_schema import recipe_schema

pytestmark = rest
TITLE = "axolotl's own examples"
INTRO = """
Each recipe in axolotl's `examples/` that has `rl: dpo`, after the change of the word,
with the plugin, `beta` and `edpo_epsilon` added. Model and data are tiny ones of the
same family and columns; batches are small, without warm-up, FlashAttention runs as
`sdpa` and `bf16: auto` as `true`. The note names what else was replaced. All else stays
as published.
"""
SIZES = dict(
    dataset_num_proc=1,
    micro_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=2,
    warmup_ratio=None,
    warmup_steps=None,
    save_strategy="no",
    saves_per_epoch=None,
    save_steps=None,
)
# Keys whose value asks for a GPU -> what they become.
ON_CPU = {
    "attn_implementation": ("attn_implementation", "sdpa"),
    "flash_attention": ("attn_implementation", "sdpa"),
    "bf16": ("bf16", True),
}
NO_SWANLAB = {"use_swanlab": False, "swanlab_project": None}
NO_ENGINE = {"fsdp_version": None, "fsdp_config": None, "accelerator_config": None}


@dataclass(frozen=True)
class Example(Cell):
    """A recipe; `keys` replace others of it, and None removes.

    Attributes:
        kind: `model_type` of the tiny model.
        config: What its config has besides SIZES.
        tokens: Tokens of the real vocabulary that the recipe names.
        columns: Of the data set: `messages` or `pairs`.
        expected: What the loaded recipe must have come to.
    """

    kind: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[str, ...] = ("<|finetune_right_pad_id|>", "<|eot_id|>")
    columns: str = "messages"
    expected: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.name.strip("`")


LORA_8BIT = {"adapter": "lora", "load_in_8bit": True}
CELLS = [
    Example(
        "`falcon-e/falcon-e-3b-dpo.yaml`",
        {"use_onebitllms": None, **NO_ENGINE},
        note="without `use_onebitllms`, which needs that package, and in one "
        "process, without FSDP2",
        tokens=("<|end_of_text|>", "<|im_end|>"),
        columns="pairs",
        expected={"adapter": None, "adam_beta2": 0.95},
    ),
    Example("`llama-3/instruct-dpo-lora-8b.yml`", expected=LORA_8BIT),
    Example(
        "`llama-3/lora-1b-deduplicate-dpo.yml`",
        config={"tie_word_embeddings": True},
        expected={**LORA_8BIT, "dataset_exact_deduplication": True},
    ),
    Example(
        "`mistral/dpo/mistral-dpo-qlora.yml`",
        kind="mistral",
        # bitsandbytes evaluates in 4 bits on a CPU where rows are whole blocks
        config={"sliding_window": None, "hidden_size": 64, "head_dim": 16},
        tokens=(),
        expected={"adapter": "qlora", "load_in_4bit": True},
    ),
    Example(
        "`qwen2/dpo.yaml`",
        kind="qwen2",
        config={"tie_word_embeddings": True},
        tokens=(),
        expected={"adapter": None},
    ),
    Example(
        "`swanlab/dpo-swanlab-completions.yml`",
        NO_SWANLAB,
        note="with the SwanLab plugin switched off: it needs the package `swanlab`",
        expected=LORA_8BIT,
    ),
    Example(
        "`swanlab/dpo-swanlab-full-featured.yml`",
        NO_SWANLAB,
        note="the same",
        expected=LORA_8BIT,
    ),
]


@pytest.fixture(autouse=True)
def plugins_of_a_recipe_go_with_it():
    """axolotl keeps every plugin of a process, with the validators of its keys."""
    plugins = PluginManager.get_instance().plugins
    before = dict(plugins)
    yield
    plugins.clear()
    plugins.update(before)


@pytest.fixture(scope="session")
def published(pytestconfig) -> Path:
    """axolotl's folder `examples/`, of the version that is installed."""
    version = importlib.metadata.version("axolotl")
    folder = Path(pytestconfig.cache.mkdir(f"axolotl-{version}"))
    with FileLock(folder / "lock"):  # another suite may want them at the same time
        if not (folder / "examples").is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                unpack_examples(version, Path(temporary)).rename(folder / "examples")
    return folder / "examples"


def unpack_examples(version: str, folder: Path) -> Path:
    """Gets the source distribution into a folder; fails where that is impossible."""
    words = f"download axolotl=={version} --no-deps --no-binary axolotl"
    got = subprocess.run(
        [sys.executable, "-m", "pip", *words.split(), "--no-build-isolation"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if got.returncode:
        pytest.fail(
            "axolotl's examples are in its source distribution only, and `pip "
            f"{words}` did not get it:\n{got.stderr[-1000:]}",
            pytrace=False,
        )
    examples = f"axolotl-{version}/examples"
    with tarfile.open(folder / f"axolotl-{version}.tar.gz") as archive:
        inside = [m for m in archive.getmembers() if m.name.startswith(f"{examples}/")]
        if hasattr(tarfile, "data_filter"):  # since Python 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder, inside)
    return folder / examples


def save_messages(path: Path, pairs: Path) -> Path:
    """The pairs with the columns of fozziethebeat/alpaca_messages_2k_dpo_test."""
    with path.open("w") as file:
        for row in map(json.loads, pairs.read_text().splitlines()):
            question, chosen = row["chosen"]
            row = {"chosen": chosen, "rejected": row["rejected"][-1]}
            file.write(json.dumps({"conversation": [question], **row}) + "\n")
    return path


def small(cell: Example, recipe: dict, folder: Path, pairs: Path) -> dict:
    """A recipe of `rl: edpo` as a user makes it, then shrunk for this machine."""
    assert recipe["rl"] == "dpo"
    plugins = [*recipe.get("plugins", []), "axolotl_edpo.EDPOPlugin"]
    edpo = dict(plugins=plugins, rl="edpo", beta=0.1, edpo_epsilon=0.05)
    keys = {**recipe, **edpo}
    Draft202012Validator(recipe_schema()).validate(keys)
    data = pairs
    if cell.columns == "messages":
        data = save_messages(folder / "messages.jsonl", pairs)
    keys["datasets"] = [
        {**entry, "path": str(data), "ds_type": "json"} for entry in recipe["datasets"]
    ]
    keys |= dict(
        base_model=str(save_model(cell, folder)),
        dataset_prepared_path=str(folder / "prepared"),
        output_dir=str(folder / "out"),
        **SIZES,
    )
    keys |= dict(new for key, new in ON_CPU.items() if key in recipe)
    keys |= {"flash_attention": None, **cell.keys}
    return {key: value for key, value in keys.items() if value is not None}


def save_model(cell: Example, folder: Path) -> Path:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(cell.tokens)})
    model = tiny.save_model(
        folder / "model", cell.kind, vocab_size=len(tokenizer), **cell.config
    )
    tokenizer.save_pretrained(model)
    return model


@matrix.cells(CELLS)
def test_an_example_of_axolotl_trains_with_edpo(cell, published, parts, tmp_path):
    recipe = yaml.safe_load((published / cell.path).read_text())
    keys = small(cell, recipe, tmp_path, parts["pairs"])
    trainer = matrix.assert_cell(cell, tmp_path, keys)
    loaded = PluginManager.get_instance().cfg
    assert {key: loaded[key] for key in cell.expected} == cell.expected
    assert trainer.args.learning_rate == recipe["learning_rate"]
    held_out = trainer.eval_dataset or ()
    assert bool(held_out) == bool(recipe.get("val_set_size"))
    assert all(
        math.isfinite(log["eval_loss"]) for log in tiny.logs(trainer, "eval_loss")
    )
    assert bool(held_out) == bool(tiny.logs(trainer, "eval_kl/policy_ref"))
    # none was dropped, and doubles were where the recipe says so
    assert len(trainer.train_dataset) + len(held_out) == 40


def test_every_dpo_recipe_of_axolotl_has_a_cell(published):
    found = {
        path.relative_to(published).as_posix()
        for path in published.rglob("*.y*ml")
        if re.search(r"^rl: *dpo\b", path.read_text(), re.MULTILINE)
    }
    assert found == {cell.path for cell in CELLS}
