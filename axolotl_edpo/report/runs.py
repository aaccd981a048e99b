"""Reads runs from their directories: model, progress and logged metrics.

A run is read from its newest complete checkpoint. So a run can also be read while it is
training, or after it was killed.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..run_files import (
    CONTROLLER,
    PREFIX,
    STATE,
    WARNINGS,
    checkpoints,
    is_complete,
    last_complete,
)
from .logged import EVAL, KL, MARGIN, METRICS, SHOWN_BY, Metric


@dataclass(frozen=True)
class Series:
    """A metric over optimizer steps: one value per step, at least one step."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Warned:
    """A line that a run logged about overfitting or collapse.

    Attributes:
        step: Optimizer step.
        name: What it is about, a key of `logged.SHOWN_BY`.
        line: The line.
    """

    step: int
    name: str
    line: str


@dataclass(frozen=True)
class Run:
    """A run up to one of its checkpoints.

    Attributes:
        path: The path that the user gave.
        folder: The folder whose state was read: a checkpoint, or `output_dir`.
        state: The content of `trainer_state.json`, by transformers.
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
        """Number of optimizer steps so far."""
        return self.state["global_step"]

    @property
    def callbacks(self) -> dict[str, Any]:
        """The saved state of callbacks, by name."""
        return self.state.get("stateful_callbacks") or {}

    @property
    def controller(self) -> dict[str, Any]:
        """β and the settings of its control; empty unless the run was `rl: edpo`."""
        return self.callbacks.get(CONTROLLER, {})

    @property
    def control(self) -> str | None:
        """`edpo_control`; None unless the run was `rl: edpo`."""
        return self.controller.get("control", "epsilon") if self.controller else None

    def series(self, name: str) -> Series | None:
        """The logged values of a metric; None if it was not logged.

        Args:
            name: Its name in the log, with `eval_` in front for evaluation.
        """
        log = self.state["log_history"]
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        return Series(*map(list, zip(*points, strict=True))) if points else None

    @property
    def warnings(self) -> list[Warned]:
        """What the run was warned of, in the order of steps."""
        return [
            Warned(entry["step"], name, line)
            for entry in self.state["log_history"]
            for name, line in entry.get(WARNINGS, {}).items()
        ]

    def marks(self, metric: Metric) -> list[Warned]:
        """The warnings that the curve of a metric shows."""
        return [w for w in self.warnings if metric in SHOWN_BY.get(w.name, ())]

    @property
    def sets(self) -> list[str]:
        """Names of the sets of `test_datasets:` that were evaluated apart."""
        keys = {key for entry in self.state["log_history"] for key in entry}
        names = (re.fullmatch(rf"{EVAL}(.+)_{MARGIN.name}", key) for key in keys)
        return sorted(name[1] for name in names if name)

    def of_sets(self, metric: Metric) -> dict[str, Series]:
        """The logged values of a metric in each set, by the set's name."""
        every = {name: self.series(f"{EVAL}{name}_{metric.name}") for name in self.sets}
        return {name: series for name, series in every.items() if series}

    def has(self, metric: Metric) -> bool:
        """Whether a metric was logged, in training or in evaluation."""
        return bool(self.series(metric.name) or self.series(EVAL + metric.name))

    def logged(self) -> dict[str, Series]:
        """All logged metrics by name; names of evaluation have `eval_` in front.

        Those of a set of `test_datasets:` have `eval_` and the set's name.
        """
        prefixes = ("", EVAL, *(f"{EVAL}{name}_" for name in self.sets))
        names = [prefix + metric.name for metric in METRICS for prefix in prefixes]
        every = {name: self.series(name) for name in names}
        return {name: series for name, series in every.items() if series}


def read_run(path: Path) -> Run:
    """Reads a run.

    Args:
        path: The `output_dir` of a recipe, or one of its checkpoints.

    Raises:
        ValueError: If there is no complete checkpoint, or nothing was logged; names
            the path and the remedy.
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
    """The folders that hold a complete state of the run; at least one."""
    newest = last_complete(path)
    complete = [folder for folder in (newest, path) if folder and is_complete(folder)]
    if complete:
        return complete
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
    skipped = [saved.name for saved in checkpoints(path) if not is_complete(saved)]
    return Run(path, folder, state, tuple(skipped))


def _is_checkpoint(folder: Path) -> bool:
    return folder.resolve().name.startswith(PREFIX)


def names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its path without the part that all runs share.

    For a single run: the last two parts of its path.
    """
    paths = [run.path.resolve() for run in runs]
    if len(paths) == 1:
        return ["/".join(paths[0].parts[-2:])]
    common = os.path.commonpath([path.parent for path in paths])
    relative = [str(path.relative_to(common)) for path in paths]
    # matplotlib does not show labels that begin with an underscore
    return [f"./{name}" if name.startswith("_") else name for name in relative]


def status(run: Run) -> str:
    """The progress of a run, as a sentence without its full stop."""
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
    """Whether early stopping, or another callback, ended the run."""
    control = run.callbacks.get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop"))


def _saved_later(run: Run) -> bool:
    """Whether the run saved its model after its last checkpoint, so it is finished."""
    state = (run.folder / STATE).stat()
    weights = run.output_dir.glob("*.safetensors")
    return any(file.stat().st_mtime > state.st_mtime for file in weights)


def model_name(run: Run) -> str | None:
    """Name of the base model, else the model's architecture; None without a config."""
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
    """A metric and the KL at one evaluation.

    Attributes:
        step: Optimizer step.
        kl: KL(π‖π_ref), nats per token.
        gain: Value of the metric.
    """

    step: int
    kl: float
    gain: float


def path_over_kl(run: Run, metric: Metric) -> list[Evaluation]:
    """A metric at each evaluation, together with the KL.

    If evaluations log no KL, the KL is the last one that training logged before.

    Args:
        run: The run.
        metric: The metric, as evaluation logs it.

    Returns:
        In the order of steps. Evaluations with a KL of 0 are left out: policy and
        reference are equal there, so all margins are 0. Empty without KL or evaluation.
    """
    gains = run.series(EVAL + metric.name)
    distance = run.series(EVAL + KL.name) or run.series(KL.name)
    if gains is None or distance is None:
        return []
    counts = [bisect_right(distance.steps, step) for step in gains.steps]
    return [
        Evaluation(step, distance.values[count - 1], gain)
        for step, count, gain in zip(gains.steps, counts, gains.values, strict=True)
        if count and distance.values[count - 1] > 0
    ]
