"""Runs, as their directories tell of them: what was trained, how far, what was logged.

The newest complete checkpoint of a run speaks for it, so a run that is still going on,
or was killed, can be read like one that is over.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..run_files import (
    CONTROLLER,
    PREFIX,
    STATE,
    checkpoints,
    is_complete,
    last_complete,
)
from .logged import EVAL, KL, METRICS, Metric


@dataclass(frozen=True)
class Series:
    """A metric over optimizer steps: as many values as steps, at least one."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """A run up to one of its checkpoints.

    Attributes:
        path: As the user gave it.
        folder: Where the state was read: a checkpoint, or the run itself.
        state: transformers' trainer state.
        skipped: Names of checkpoints whose save was interrupted.
    """

    path: Path
    folder: Path
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()

    @property
    def output_dir(self) -> Path:
        """The recipe's `output_dir`."""
        folder = self.folder.resolve()
        return folder.parent if _is_checkpoint(folder) else folder

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.state["global_step"]

    @property
    def callbacks(self) -> dict[str, Any]:
        """State of the callbacks that keep one."""
        return self.state.get("stateful_callbacks") or {}

    @property
    def controller(self) -> dict[str, Any]:
        """β and what it came from; empty unless the run was of `rl: edpo`."""
        return self.callbacks.get(CONTROLLER, {})

    @property
    def control(self) -> str | None:
        """`edpo_control`; None unless the run was of `rl: edpo`."""
        return self.controller.get("control", "epsilon") if self.controller else None

    def series(self, name: str) -> Series | None:
        """A metric as it was logged, or None."""
        log = self.state["log_history"]
        found = [(entry["step"], entry[name]) for entry in log if name in entry]
        return Series(*map(list, zip(*found, strict=True))) if found else None

    def has(self, metric: Metric) -> bool:
        """Whether a metric was logged, in training or in evaluation."""
        return bool(self.series(metric.name) or self.series(EVAL + metric.name))

    def logged(self) -> dict[str, Series]:
        """All metrics that were logged, those of evaluation with `eval_` in front."""
        names = [prefix + metric.name for metric in METRICS for prefix in ("", EVAL)]
        found = {name: self.series(name) for name in names}
        return {name: series for name, series in found.items() if series}


def read_run(path: Path) -> Run:
    """Reads a run.

    Args:
        path: The `output_dir` of a recipe, or one of its checkpoints.

    Raises:
        ValueError: Names the path, what was looked for and what to do.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such directory")
    runs = [_read_state(path, folder) for folder in _candidates(path)]
    run = max(runs, key=lambda run: run.steps)
    if not run.logged():
        raise ValueError(
            f"{run.folder / STATE}: nothing was logged up to step "
            f"{run.steps}: train with a smaller `logging_steps`"
        )
    return run


def _candidates(path: Path) -> list[Path]:
    """Complete folders that may speak for a run, one at least."""
    newest = last_complete(path)
    found = [folder for folder in (newest, path) if folder and is_complete(folder)]
    if found:
        return found
    if _is_checkpoint(path):
        raise ValueError(
            f"{path}: its {STATE} is missing or cut short, so its save was "
            f"interrupted: name its run, {path.parent}, or another checkpoint"
        )
    incomplete = [folder.name for folder in checkpoints(path)]
    if incomplete:
        raise ValueError(
            f"{path}: no checkpoint was saved to its end (there is "
            f"{', '.join(incomplete)}): let the run reach its next one"
        )
    raise ValueError(
        f"{path}: no run: it has neither {PREFIX}* nor {STATE}: name the "
        "`output_dir` of a recipe that saves checkpoints"
    )


def _read_state(path: Path, folder: Path) -> Run:
    file = folder / STATE
    state = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not {"global_step", "log_history"} <= {*state}:
        raise ValueError(f"{file}: not written by a trainer: remove {folder}")
    skipped = [other.name for other in checkpoints(path) if not is_complete(other)]
    return Run(path, folder, state, tuple(skipped))


def _is_checkpoint(folder: Path) -> bool:
    return folder.resolve().name.startswith(PREFIX)


def names(runs: Sequence[Run]) -> list[str]:
    """What sets the paths of several runs apart; of one run, how its path ends."""
    paths = [run.path.resolve() for run in runs]
    if len(paths) == 1:
        return ["/".join(paths[0].parts[-2:])]
    common = os.path.commonpath([path.parent for path in paths])
    found = [str(path.relative_to(common)) for path in paths]
    # matplotlib leaves labels out that begin with an underscore
    return [f"./{name}" if name.startswith("_") else name for name in found]


def status(run: Run) -> str:
    """How far a run came, as a sentence without its full stop."""
    done, planned = run.steps, run.state.get("max_steps") or run.steps
    if done >= planned:
        return f"finished: {done} steps"
    if _stopped_itself(run):
        return f"stopped itself after {done} of {planned} steps"
    reached = f"{done} of {planned} steps, last complete checkpoint {run.folder.name}"
    if _is_checkpoint(run.path):
        return f"{done} of {planned} steps"
    if _saved_later(run):
        return f"{reached}; the model was saved later, those steps are not shown"
    return f"not finished: {reached}"


def _stopped_itself(run: Run) -> bool:
    """Early stopping, or another callback that ends a run."""
    control = run.callbacks.get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop"))


def _saved_later(run: Run) -> bool:
    """Whether a run that kept no last checkpoint ended all the same."""
    state = (run.folder / STATE).stat()
    weights = run.output_dir.glob("*.safetensors")
    return any(file.stat().st_mtime > state.st_mtime for file in weights)


def model_name(run: Run) -> str | None:
    """The base model of an adapter, or the kind of model, if a config was saved."""
    for folder in (run.folder, run.output_dir):
        adapter = _read_config(folder / "adapter_config.json")
        config = _read_config(folder / "config.json")
        name = adapter.get("base_model_name_or_path") or config.get("_name_or_path")
        kind = (config.get("architectures") or [None])[0]
        if name or kind:
            return name or kind
    return None


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class Evaluation(NamedTuple):
    """A point of a run's path: what it had gained, and how far it had gone for it."""

    step: int
    kl: float
    gain: float


def path_over_kl(run: Run, metric: Metric) -> list[Evaluation]:
    """A metric at each evaluation, with the KL there; that of training if need be.

    Returns:
        In order, from where policy and reference are no longer equal: before, accuracy
        is 0 because all margins are. Empty for runs that log no KL or evaluate never.
    """
    gains = run.series(EVAL + metric.name)
    distance = run.series(EVAL + KL.name) or run.series(KL.name)
    if gains is None or distance is None:
        return []
    before = [bisect_right(distance.steps, step) for step in gains.steps]
    return [
        Evaluation(step, distance.values[count - 1], gain)
        for step, count, gain in zip(gains.steps, before, gains.values, strict=True)
        if count and distance.values[count - 1] > 0
    ]
