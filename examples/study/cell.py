"""One cell: write its recipe, train it as `axolotl train` does, grade the policy.

    work/worlds/<digest>/        language model and pairs of a seed
    work/cells/<digest>.yml      the recipe; `axolotl train` takes it too
    work/cells/<digest>.json     the result, there when it is whole or not at all
    work/cells/<digest>.log      what axolotl said
    work/cells/<digest>.trace/   its trace, where the recipe asks for one
    work/cells/<digest>/         the run, gone once it is measured

This is imported in worker processes: axolotl takes seconds to import.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from grid import REFERENCE, Cell, build

SERIES = ("kl/beta", "kl/policy_ref", "rewards/margins", "kl/avg_steps")
UNPAIRED = "unpaired.jsonl"  # of a world
PACKAGES = ("axolotl-edpo", "axolotl", "trl", "transformers", "torch")


def world_folder(work: Path, world: build.Settings) -> Path:
    """Where a world is; another one is elsewhere."""
    digest = hashlib.sha256(build.manifest(world).encode()).hexdigest()[:16]
    return work / "worlds" / digest


def result_file(work: Path, cell: Cell) -> Path:
    """Where the result of a cell is, or will be."""
    return work / "cells" / f"{cell.digest()}.json"


def trace_folder(result: Path) -> Path:
    """Where the trace of a run is kept, beside its result."""
    return result.with_suffix(".trace")


def build_world(work: Path, world: build.Settings) -> None:
    """Makes the world of a seed, unless it is there."""
    folder = world_folder(work, world)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _said_in(folder.with_suffix(".log")):
        build.main(world, folder)
    write_whole(folder / UNPAIRED, _unpaired((folder / "train.jsonl").read_text()))


def _unpaired(pairs: str) -> str:
    """JSON lines with one answer each, and whether it was chosen: what KTO reads."""
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in map(json.loads, pairs.splitlines())
        for side in ("chosen", "rejected")
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_whole(file: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def run(work: Path, cell: Cell) -> Path:
    """Trains and measures a cell.

    Args:
        work: The study's folder; the cell's world is in it.
        cell: Any.

    Returns:
        The file with the result.

    Raises:
        RuntimeError: Names the cell, its recipe and where its output is.
    """
    file = result_file(work, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    recipe, log = file.with_suffix(".yml"), file.with_suffix(".log")
    try:
        with _said_in(log):
            result = _measured(cell, world_folder(work, cell.world), recipe)
            text = json.dumps(result, indent=1)
    except Exception as error:
        raise RuntimeError(
            f"{cell.name}: {type(error).__name__}: {error} (recipe {recipe}, output "
            f"{log}): what is done is kept; run the study again to go on"
        ) from error
    write_whole(file, text)
    return file


def recipe_of(cell: Cell, world: Path, output: Path) -> dict[str, Any]:
    """The whole recipe of a cell, paths included."""
    return {
        "base_model": str(world / "model"),
        **cell.keys,
        "datasets": [(_answers if cell.keys.get("rl") == "kto" else _pairs)(world)],
        # inside the run: a lock that a killed study left is gone with it
        "dataset_prepared_path": str(output / "prepared"),
        "output_dir": str(output),
    }


def _pairs(world: Path) -> dict[str, Any]:
    return {
        "path": str(world / "train.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "prompt",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
    }


def _answers(world: Path) -> dict[str, Any]:
    """The same answers one by one, as `rl: kto` of axolotl takes them."""
    template = {
        "prompt_format": "<s><|user|>{prompt}<|assistant|>",
        "completion_format": "{completion}</s>",
    }
    file = str(world / UNPAIRED)
    return {"path": file, "ds_type": "json", "split": "train", "type": template}


def train(recipe: Path):
    """Trains a recipe in this process.

    Args:
        recipe: A YAML file.

    Returns:
        The policy, and axolotl's trainer.
    """
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import train as axolotl_train

    cfg = load_cfg(str(recipe))
    data = load_preference_datasets(cfg=cfg)
    model, _, trainer = axolotl_train(cfg=cfg, dataset_meta=data)
    return model.eval(), trainer


def _measured(cell: Cell, world: Path, recipe: Path) -> dict[str, Any]:
    """Result of a cell, as plain JSON values."""
    import lm
    import torch
    from grade import grade

    output = recipe.with_suffix("")
    shutil.rmtree(output, ignore_errors=True)
    keys = recipe_of(cell, world, output)
    recipe.write_text(f"# {cell.name}\n{yaml.safe_dump(keys, sort_keys=False)}")
    started = perf_counter()
    reference, tokenizer = lm.load(world / "model")
    policy, run = reference, {}
    if cell.method != REFERENCE:
        policy, trainer = train(recipe)
        run = {"steps": trainer.state.global_step, "series": _series(trainer)}
    trained = perf_counter()
    reference.to(policy.device)
    with torch.no_grad():
        grades = grade(policy, reference, tokenizer, world, cell.answers, cell.seed)
    measured = perf_counter()
    result = {
        "name": cell.name,
        "keys": cell.keys,
        **grades,
        **run,
        **_decisions(cell, output, world),
        "seconds": {"train": trained - started, "measure": measured - trained},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    _keep_trace(cell, output, trace_folder(recipe))
    shutil.rmtree(output, ignore_errors=True)
    return result


def _series(trainer) -> dict[str, list[float]]:
    """What was logged at every step."""
    history = trainer.state.log_history
    return {
        name: [entry[name] for entry in history if name in entry] for name in SERIES
    }


def _decisions(cell: Cell, output: Path, world: Path) -> dict[str, Any]:
    """What the saved policies of a run tell, where it has them."""
    if not cell.keys.get("save_only_model"):
        return {}
    from decisions import agreement

    return {"decisions": agreement(output, world, cell.keys["edpo_epsilon"])}


def _keep_trace(cell: Cell, output: Path, kept: Path) -> None:
    """Moves the trace of a run out of it."""
    if "edpo_log_pairs" in cell.keys:
        shutil.rmtree(kept, ignore_errors=True)
        (output / "edpo_pairs").rename(kept)


@contextlib.contextmanager
def _said_in(log: Path) -> Iterator[None]:
    """Sends all that this process prints into a file, progress bars included."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)
