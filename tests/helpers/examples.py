"""Recipes of `examples/`: read as axolotl reads them, and made tiny."""

from pathlib import Path

import yaml

from helpers import tiny

ENGINE = (
    "deepspeed",
    "fsdp_version",
    "fsdp_config",
    "dp_shard_size",
    "context_parallel_size",
    "accelerator_config",
)
REMOVED = (*ENGINE, "saves_per_epoch", "save_steps")
TURN = ["<start_of_turn>", "<end_of_turn>"]
# What sets these families apart from Llama.
ARCHITECTURES = {
    "llama": {},
    "mistral": dict(sliding_window=16),
    "gemma2": dict(
        vocab_size=len(tiny.byte_tokenizer()) + len(TURN),
        query_pre_attn_scalar=8,
        sliding_window=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
}


def read(path: Path) -> dict:
    """The recipe, with the line that its comment names before axolotl 0.21."""
    return tiny.named(yaml.safe_load(path.read_text()))


def header(path: Path) -> str:
    """The comment a file opens with, without its marks."""
    lines = path.read_text().splitlines()
    end = next((i for i, line in enumerate(lines) if line[:1] != "#"), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def architecture(recipe: dict) -> str:
    """The key in ARCHITECTURES of the recipe's model."""
    name = recipe["base_model"].lower()
    return next((kind for kind in ("gemma2", "mistral") if kind[:6] in name), "llama")


def save_parts(folder: Path) -> dict:
    """Saves one tiny model for each family, and 8 pairs.

    Returns:
        `models` by family, the file of `pairs`, and a folder for what is `prepared`.
    """
    models = {
        kind: tiny.save_model(folder / kind, kind, **config)
        for kind, config in ARCHITECTURES.items()
    }
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TURN})
    tokenizer.chat_template = None  # as Gemma 2's base model has none
    tokenizer.save_pretrained(models["gemma2"])
    pairs = tiny.save_pairs(folder / "pairs.jsonl", 8)
    return {"models": models, "pairs": pairs, "prepared": folder / "prepared"}


def shrunk(recipe: dict, parts: dict, folder: Path) -> dict:
    """The recipe with tiny parts, for two steps in one process.

    Args:
        recipe: As its file has it.
        parts: What `save_parts` returns.
        folder: Of the output.
    """
    local = dict(path=str(parts["pairs"]), ds_type="json")
    small = {
        key: [{**entry, **local} for entry in recipe[key]]
        for key in ("datasets", "test_datasets")
        if key in recipe
    }
    small |= dict(
        base_model=str(parts["models"][architecture(recipe)]),
        dataset_prepared_path=str(parts["prepared"]),
        dataset_num_proc=1,
        output_dir=str(folder / "out"),
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        save_strategy="no",
    )
    if recipe["attn_implementation"].startswith("flash"):
        small["attn_implementation"] = "sdpa"
    kept = {key: recipe[key] for key in recipe if key not in REMOVED}
    return {**kept, **small}
