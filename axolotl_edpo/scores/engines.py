"""Which engine of a recipe scores: an engine that shards weights, on several ranks.

One process needs no engine. ZeRO-1 and ZeRO-2 shard optimizer and gradients, which an
evaluation has not: there is DDP instead, and the same scores.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENGINES = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version")
# How an engine divides the ranks.
SIZES = (
    "context_parallel",
    "context_parallel_size",
    "dp_replicate_size",
    "dp_shard_size",
)


def removed_engines(recipe: Mapping[str, Any]) -> dict[str, None]:
    """The keys of an engine that is not used, with the value None.

    Args:
        recipe: The YAML of the recipe.
    """
    removed = dict.fromkeys(key for key in ENGINES + SIZES if key in recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return removed
    deepspeed = recipe.get("deepspeed")
    return {"deepspeed": None} if deepspeed and _stage(deepspeed) != 3 else {}


def _stage(deepspeed: Any) -> int:
    """The stage of ZeRO; 3 for what axolotl is to refuse, a file that is not there."""
    if isinstance(deepspeed, str):
        if not Path(deepspeed).is_file():
            return 3
        deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    return deepspeed.get("zero_optimization", {}).get("stage", 0)
