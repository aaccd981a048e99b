"""Changes of a recipe that lower its memory, each with the peak that it would have."""

from collections.abc import Iterator
from typing import NamedTuple

from .memory import Arguments
from .recipe_memory import RecipeMemory

# Rank of an adapter for a recipe without one.
RANK = 16
# Changes that save less than this are left out.
LEAST = 2**30 // 20


class Change(NamedTuple):
    """A change of a recipe.

    Attributes:
        keys: What to write into the recipe, and in brackets what else it changes.
        arguments: What is then calculated.
    """

    keys: str
    arguments: Arguments

    @property
    def peak(self) -> float:
        """Peak bytes per GPU with the change."""
        return self.arguments.memory.total


def changes(recipe: RecipeMemory) -> list[Change]:
    """The changes that lower the peak, the one that lowers it most first.

    Args:
        recipe: The memory of a recipe.
    """
    groups = (_batch, _reference, _adapters, _engines)
    found = [change for group in groups for change in group(recipe)]
    bound = recipe.arguments.memory.total - LEAST
    lower = [change for change in found if change.peak <= bound]
    return sorted(lower, key=lambda change: change.peak)


def _batch(recipe: RecipeMemory) -> Iterator[Change]:
    """Fewer tokens in a micro-batch."""
    now, pairs = recipe.arguments, recipe.pairs
    if pairs > 1:
        accumulation = pairs * recipe.accumulation
        yield Change(
            f"micro_batch_size: 1, gradient_accumulation_steps: {accumulation}",
            now._replace(tokens=now.tokens // pairs),
        )
    if not recipe.given:
        yield Change(
            f"sequence_len: {recipe.length // 2} (drops or cuts longer pairs)",
            now._replace(tokens=now.tokens // 2),
        )


def _reference(recipe: RecipeMemory) -> Iterator[Change]:
    now = recipe.arguments
    if not (now.cached or recipe.moves):
        yield Change("precompute_ref_log_probs: true", now._replace(cached=True))


def _adapters(recipe: RecipeMemory) -> Iterator[Change]:
    """Adapters that train fewer weights, or leave more of them in 4 bits."""
    now = recipe.arguments
    if recipe.moves:  # which needs a reference of its own
        return
    lora = now._replace(lora=now.lora or RANK, float32_root=False)
    new = f"lora_r: {RANK}, lora_target_linear: true"
    if not now.lora:
        yield Change(f"adapter: lora, {new}", lora)
    # axolotl refuses 4 bits under FSDP2 beside `rl`
    if not now.four_bit and now.engine != "fsdp2":
        rank = "" if now.lora else f", {new}"
        keys = f"adapter: qlora, load_in_4bit: true{rank}"
        yield Change(keys, lora._replace(four_bit=True))


def _engines(recipe: RecipeMemory) -> Iterator[Change]:
    """Engines that shard more, if there are several GPUs."""
    now = recipe.arguments
    if now.ranks == 1:
        return
    if now.engine != "zero3" and now.context == 1:  # DeepSpeed divides no rows
        yield Change(
            "deepspeed: deepspeed_configs/zero3_bf16.json",
            now._replace(engine="zero3", float32_root=False),
        )
    if not (now.four_bit or now.engine == "fsdp2" and now.sync):
        rounded = "" if now.lora else " (16-bit weights train)"
        yield Change(
            f"fsdp_version: 2, fsdp_config: …, sync_each_batch: true{rounded}",
            now._replace(engine="fsdp2", sync=True, float32_root=False),
        )
