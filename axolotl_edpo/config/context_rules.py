"""Rules for context parallelism: ranks that divide a packed row among them.

`check_context` reads the recipe, `check_ranks` also the number of ranks.
"""

from typing import Any

from ..errors import quote, refuse
from ..upstream import has_context_parallelism
from .args import LOWERED
from .rules import Recipe, Rule, refused, value_at

SIZE, BLOCK = "context_parallel_size", "context_parallel"
# Values that keys of axolotl's `context_parallel:` may have beside `size`.
HARMLESS = {
    "backend": ("auto", "ulysses"),
    "ring_size": (1,),
    "load_balance": ("auto", "none"),
    "shard_in_collator": (True, False),
}
IMAGES = ("is_multimodal", "processor_type")
DIVIDED = "with `context_parallel_size` above 1 GPUs divide a packed row"


def _rules(key: str) -> tuple[Rule, ...]:
    """Rules for a size above 1, which was written under this key."""
    return (
        Rule(
            key,
            lambda recipe: not has_context_parallelism(),
            "set 1, or install axolotl 0.20 or later",
        ),
        Rule(
            key,
            lambda recipe: recipe.get("deepspeed"),
            "set 1, or `fsdp_version: 2` and `fsdp_config:` in place of `deepspeed:`",
        ),
        Rule(
            key,
            lambda recipe: recipe.get("use_ray") and not recipe.get("fsdp_config"),
            "set `fsdp_version: 2` and `fsdp_config:`, or remove `use_ray`: without "
            "FSDP2 accelerate fails in Ray's workers",
        ),
        *refused(dict.fromkeys(IMAGES, f"remove it: {DIVIDED}")),
        Rule(
            "sample_packing",
            lambda recipe: recipe["sample_packing"] == "auto",
            f"set true: {DIVIDED}",
        ),
        Rule(
            key,
            lambda recipe: (
                not (recipe["sample_packing"] or recipe.get("dpo_padding_free"))
            ),
            "set `sample_packing: true`: GPUs divide a packed row",
        ),
        Rule(
            "eval_sample_packing",
            lambda recipe: recipe["eval_sample_packing"] is False,
            f"remove it: {DIVIDED}",
        ),
    )


def check_context(recipe: Recipe) -> None:
    """Refuses recipes whose rows cannot be divided among ranks.

    Args:
        recipe: The YAML, with the keys of packing renamed.

    Raises:
        ValueError: One line with key, value and what to set.
    """
    key = SIZE if recipe.get(SIZE) else f"{BLOCK}.size"
    size = value_at(recipe, key) or 1
    if size == 1:
        return
    written = {name: recipe.get(lowered) for name, lowered in LOWERED.items()}
    for rule in _rules(key):
        rule({**recipe, **written})
    for name, value in (recipe.get(BLOCK) or {}).items():
        allowed = HARMLESS.get(name, (size,))
        if value is not None and value not in allowed:
            remedy = "remove it: the GPUs exchange heads for tokens (Ulysses)"
            refuse(f"{BLOCK}.{name}", value, remedy)


def check_ranks(cfg: Any) -> None:
    """Refuses numbers of ranks that do not make whole groups.

    Args:
        cfg: axolotl's config, on a rank of the run.

    Raises:
        ValueError: Names the key to set.
    """
    size, ranks = cfg.context_parallel_size or 1, cfg.world_size or 1
    shards, copies = cfg.dp_shard_size or 1, cfg.dp_replicate_size or 1
    makes_groups = cfg.fsdp_config or size == ranks  # accelerate has no DDP over groups
    if size == 1 or makes_groups and size * shards * copies == ranks:
        return
    if ranks == 1:
        raise ValueError(
            f"{quote(SIZE, size)} in a run of one process: remove it, or start "
            f"{size} processes, one per GPU"
        )
    line = f"{quote(SIZE, size)} with {ranks} GPUs"
    if ranks % size:
        raise ValueError(f"{line}: {size} does not divide them: set a divisor of them")
    if not cfg.fsdp_config:
        raise ValueError(
            f"{line}: without `fsdp_config:` all GPUs divide each row: set "
            f"{quote(SIZE, ranks)} alone, or `fsdp_version: 2`, `fsdp_config:` and "
            f"`dp_shard_size: {ranks // size}`"
        )
    if copies > 1:
        replicas = quote("dp_replicate_size", copies)
        raise ValueError(
            f"{line}: with {replicas} they must be {size} times `dp_shard_size` times "
            f"{copies}: remove {replicas} and set `dp_shard_size: {ranks // size}`"
        )
    raise ValueError(f"{line}: set `dp_shard_size: {ranks // size}`")
