"""The tables of README.md and docs/ that are made of the code.

    python tests/helpers/docs_tables.py      writes them anew

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. Options are the
pydantic fields of config/args.py; gigabytes are those of tools/memory.py.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import chdir
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from axolotl_edpo.config.args import LOWERED, Bounds, EDPOArgs, Moving
from axolotl_edpo.plugin import PLUGIN
from axolotl_edpo.recipe import config_of
from axolotl_edpo.tools import page
from axolotl_edpo.tools.memory import Arguments, Memory
from axolotl_edpo.tools.model_sizes import sizes_of
from axolotl_edpo.tools.recipe_memory import RecipeMemory, recipe_memory

ROOT = Path(__file__).parent.parent.parent
PAGES = tuple(
    ROOT / name
    for name in ("README.md", "docs/options.md", "docs/distributed-and-memory.md")
)
FRAME = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
GIB = 2**30

# --- options -------------------------------------------------------------------------

# Keywords of a JSON schema, also those that pydantic does not translate -> a sign.
SIGNS = {
    "exclusiveMinimum": ">",
    "gt": ">",
    "minimum": "≥",
    "ge": "≥",
    "exclusiveMaximum": "<",
    "lt": "<",
    "maximum": "≤",
    "le": "≤",
}
KINDS = {
    "number": "number",
    "integer": "whole number",
    "string": "text",
    "boolean": "`true`, `false`",
    "array": "list",
}
Schema = Mapping[str, Any]


def values(option: Schema) -> str:
    """The values that an option takes, such as `number > 0`."""
    kinds = [k for k in option.get("anyOf", [option]) if k.get("type") != "null"]
    return ", ".join(map(_kind, kinds))


def _kind(schema: Schema) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    bounds = [f"{sign} {schema[key]:g}" for key, sign in SIGNS.items() if key in schema]
    return " ".join([KINDS[schema["type"]], " and ".join(bounds)]).strip()


def default(option: Schema) -> str:
    """The default as YAML writes it; empty if an option is absent by default."""
    given = option.get("default")
    return "" if given is None else f"`{str(given).lower()}`"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], right: int = 0) -> str:
    """A table in Markdown.

    Args:
        heads: Titles of the columns.
        rows: The cells of each row.
        right: Number of columns at the end whose cells are numbers.
    """
    heads = [*heads]
    marks = ["---"] * (len(heads) - right) + ["---:"] * right
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:], ""])


def options() -> str:
    """A row per option of the plugin, under the key that a recipe has."""
    written = {lowered: key for key, lowered in LOWERED.items()}
    rows = []
    for name, option in EDPOArgs.model_json_schema()["properties"].items():
        key = written.get(name, name)
        text = option["description"].removeprefix(f"Write `{key}`. ")
        text = text.replace("|", "\\|")
        rows.append((f"`{key}`", values(option), default(option), text))
    return table(("key", "values", "default", "meaning"), rows)


def checked_options() -> str:
    """A row per option of axolotl whose values are checked here."""
    properties = dict(Bounds.model_json_schema()["properties"])
    moving = Moving.model_json_schema()["properties"]
    properties |= {f"trl.{key}": option for key, option in moving.items()}
    rows = [(f"`{k}`", values(o), o["description"]) for k, o in properties.items()]
    return table(("key", "values", "meaning"), rows)


# --- memory --------------------------------------------------------------------------

# The published sizes of the models.
LLAMA = dict(num_key_value_heads=8, vocab_size=128256)
CONFIGS = {
    "8B": LlamaConfig(hidden_size=4096, intermediate_size=14336, **LLAMA),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        **LLAMA,
    ),
    "3B": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
        **LLAMA,
    ),
    "Mistral 7B": MistralConfig(),
    "Gemma 2 2B": Gemma2Config(),
}
ADAPTER = dict(lora=16)
NF4 = dict(lora=16, four_bit=True)
SYNC = dict(sync=True)
# Row -> engine and keywords of `Arguments`.
ENGINES: dict[str, tuple[Any, dict]] = {
    "DDP (no 32-bit weights)": ("ddp", {}),
    "ZeRO-1": ("zero1", {}),
    "ZeRO-2": ("zero2", {}),
    "ZeRO-2, cached reference": ("zero2", dict(cached=True)),
    "ZeRO-3": ("zero3", {}),
    "ZeRO-3, cached reference": ("zero3", dict(cached=True)),
    "FSDP2 (no 32-bit weights)": ("fsdp2", {}),
    "FSDP2, `sync_each_batch`": ("fsdp2", SYNC),
    "FSDP2, `sync_each_batch`, cached reference": ("fsdp2", dict(cached=True, **SYNC)),
    "LoRA (rank 16), DDP": ("ddp", ADAPTER),
    "LoRA, ZeRO-3": ("zero3", ADAPTER),
    "LoRA, FSDP2": ("fsdp2", ADAPTER),
    "QLoRA, DDP": ("ddp", NF4),
}
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "head",
    "layer",
    "activations",
)


@cache
def _sizes(model: str) -> Any:
    return sizes_of(CONFIGS[model])


def need(model: str, engine: Any, ranks: int, tokens: int, **keys: Any) -> Memory:
    """Calculated bytes per GPU of a model of CONFIGS; see `tools.memory.Arguments`."""
    return Arguments(_sizes(model), engine, ranks, tokens, **keys).memory


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}" if value / GIB >= 0.05 else ""


def by_engine(model: str) -> str:
    """A row per engine: GiB per GPU on 8 GPUs, rows of 4096 tokens.

    Engines that need more than 200 GiB are left out.
    """
    rows = []
    for name, (engine, keys) in ENGINES.items():
        found = need(model, engine, 8, 4096, **keys)
        numbers = [*(getattr(found, part) for part in PARTS), found.total]
        if found.total < 200 * GIB:
            rows.append((name, *map(_gib, numbers)))
    return table((model, *PARTS, "peak"), rows, right=len(PARTS) + 1)


def on_one_gpu() -> str:
    """GiB of an 8B model on one GPU, by the tokens of a row."""
    kinds = {
        "`adapter: qlora`": NF4,
        "`adapter: lora`, 16 bits": ADAPTER,
        "all weights": {},
    }
    lengths = (2048, 4096, 8192)
    rows = [
        (name, *(_gib(need("8B", "ddp", 1, n, **keys).total) for n in lengths))
        for name, keys in kinds.items()
    ]
    return table(("8B", *(f"rows of {n}" for n in lengths)), rows, right=3)


class Example(NamedTuple):
    """A recipe of examples/: the key in CONFIGS of its model, and its line."""

    model: str
    gpus: int
    card: str
    trains: str


RECIPES = {
    "llama3_qlora_edpo": Example("8B", 1, "24 GB", "Llama 3 8B, QLoRA"),
    "llama3_lora_edpo": Example("3B", 1, "24 GB", "Llama 3.2 3B, LoRA"),
    "gemma2_hh_edpo": Example("Gemma 2 2B", 1, "80 GB", "Gemma 2 2B"),
    "llama3_fsdp2_edpo": Example("8B", 8, "24 GB", "Llama 3 8B, LoRA, FSDP2"),
    "llama3_long_edpo": Example("8B", 8, "24 GB", "Llama 3.1 8B, LoRA, long pairs"),
    "llama3_zero3_edpo": Example("8B", 8, "40 GB", "Llama 3 8B, ZeRO-3"),
    "llama3_edpo": Example("8B", 8, "80 GB", "Llama 3 8B, ZeRO-2"),
    "mistral_edpo": Example("Mistral 7B", 8, "80 GB", "Mistral 7B, ZeRO-2"),
}


def save_recipe(name: str, folder: Path) -> Path:
    """Saves a recipe of examples/ with the config of its model, no weights.

    `base_model` is relative to the folder: axolotl takes a path with `mpt` in it, as a
    temporary folder may have, for an MPT.
    """
    recipe = yaml.safe_load((ROOT / "examples" / f"{name}.yml").read_text())
    CONFIGS[RECIPES[name].model].save_pretrained(folder / "model")
    here: dict[str, Any] = {"base_model": "model", "plugins": [PLUGIN]}
    if "deepspeed" in recipe:
        here["deepspeed"] = str(ROOT / recipe["deepspeed"])
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({**recipe, **here}))
    return path


@cache
def memory_of_recipe(name: str) -> RecipeMemory:
    """What `axolotl edpo-memory` calculates for a recipe of examples/."""
    with TemporaryDirectory() as folder, chdir(folder):
        path = save_recipe(name, Path(folder))
        with config_of(str(path), "edpo-memory") as cfg:
            return recipe_memory(cfg, RECIPES[name].gpus, None)


def printed(name: str) -> str:
    """What `axolotl edpo-memory` prints for a recipe of examples/."""
    recipe = yaml.safe_load((ROOT / "examples" / f"{name}.yml").read_text())
    found = memory_of_recipe(name)
    named = replace(found, model=recipe["base_model"], assumed=True)
    text = "\n".join(page.lines(named))
    return f"\n```text\n{text}\n```\n\n"


def gib_of_recipe(name: str) -> int:
    """Calculated GiB per GPU of a recipe whose pairs are all as long as it allows."""
    return round(memory_of_recipe(name).arguments.memory.total / GIB)


def recipes() -> str:
    """A row per recipe of examples/ for GPUs."""
    rows = [
        (
            f"[{name}.yml](examples/{name}.yml)",
            example.trains,
            f"{example.gpus} × {example.card}",
            f"{gib_of_recipe(name)} GiB",
        )
        for name, example in RECIPES.items()
    ]
    return table(("recipe", "trains", "GPUs", "calculated, each"), rows, right=1)


# --- pages ---------------------------------------------------------------------------

TABLES = {
    "options": options,
    "checked options": checked_options,
    "memory of 8B": lambda: by_engine("8B"),
    "memory of 70B": lambda: by_engine("70B"),
    "memory of 8B on one GPU": on_one_gpu,
    "recipes": recipes,
    "edpo memory": lambda: printed("llama3_edpo"),
}


def written_anew(text: str) -> str:
    """A page with its tables as they are now."""
    return FRAME.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written_anew(path.read_text()))
