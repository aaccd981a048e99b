"""The engines that tests run, as keys of a recipe; values that a rank logged."""

import json
from pathlib import Path

from helpers import ranks

CPU = {"device": "cpu"}
# `zero_optimization` of a DeepSpeed file, by the name of the engine.
STAGES = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3},
    "zero3-offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
# What an engine adds to the `fsdp_config` of a recipe.
SHARDS = {
    "fsdp2": {},
    "fsdp2-offload": {"offload_params": True, "cpu_offload_pin_memory": False},
    "fsdp2-rank0-loads": {"cpu_ram_efficient_loading": True},
}
ENGINES = ["ddp", *STAGES, *SHARDS]


def engine(folder: Path, name: str) -> dict:
    """The keys of a recipe that choose an engine.

    Args:
        folder: Where a DeepSpeed file is written.
        name: Of ENGINES.
    """
    if name == "ddp":
        return {}
    if name in SHARDS:
        return dict(fsdp_version=2, fsdp_config={**ranks.FSDP2, **SHARDS[name]})
    stage = {**STAGES[name], "stage3_gather_16bit_weights_on_model_save": True}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**ranks.ZERO, "zero_optimization": stage}))
    return dict(deepspeed=str(path))


def series(result: dict, name: str, beside: str = "loss") -> list[float]:
    """The values of a metric in the order of the log.

    Args:
        result: What `ranks.run` returns of a rank.
        name: The metric.
        beside: Only entries that have this key count; `loss` is one per step.
    """
    return [entry[name] for entry in result["log"] if beside in entry]
