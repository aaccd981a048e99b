"""Charts of runs and pairs with their captions, and the same as numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..run_files import TEXTS
from . import figures, logged, runs, trace
from .logged import EVAL, Metric
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

CURVES = (
    logged.AVERAGE,
    logged.KL,
    logged.LOSS,
    logged.MARGIN,
    logged.ACCURACY,
    logged.RATE,
)
COMPARED = (logged.BETA, logged.NET, *CURVES)


@dataclass(frozen=True)
class Chart:
    """A figure in a page.

    Attributes:
        name: Of its PNG, without the suffix.
        figure: The drawing.
        caption: How to read it.
    """

    name: str
    figure: "Figure"
    caption: str


@dataclass(frozen=True)
class Pairs:
    """A run's traced pairs: observations, and a row per pair, see `trace.by_pair`."""

    observations: "DataFrame"
    table: "DataFrame"


def read_pairs(run: Run) -> Pairs | None:
    """The trace of a run, if it has one."""
    observations = trace.read_trace(run.output_dir, run.steps)
    if observations is None:
        return None
    return Pairs(observations, trace.by_pair(observations))


# --- one run -----------------------------------------------------------------------


def charts_of_run(run: Run) -> Iterator[Chart]:
    """Curves of what one run logged."""
    if run.has(logged.BETA):
        yield _curve(run, logged.BETA)
    if run.has(logged.UP):
        yield Chart(
            "shares",
            figures.draw_shares(run),
            "Moved up: chosen and rejected separate better under a smaller β; the pair "
            "is let go. Moved down: under a larger one; the pair goes against what the "
            "policy has learned. Lines: training; dots: evaluation.",
        )
    for metric in CURVES:
        if run.has(metric):
            yield _curve(run, metric)


def _curve(run: Run, metric: Metric) -> Chart:
    both = run.series(metric.name), run.series(EVAL + metric.name)
    return Chart(_file(metric), figures.draw_metric(metric, *both), metric.note)


def _file(metric: Metric) -> str:
    return metric.name.replace("/", "_")


# --- several -----------------------------------------------------------------------


def charts_of_runs(several: Sequence[Run], names: Sequence[str]) -> Iterator[Chart]:
    """The frontier first, then the curves of several runs over each other."""
    yield from _frontier(several, names)
    for metric in COMPARED:
        if any(run.has(metric) for run in several):
            figure = figures.draw_runs(metric, several, names)
            yield Chart(_file(metric), figure, metric.note)


def _frontier(several: Sequence[Run], names: Sequence[str]) -> Iterator[Chart]:
    notes = {
        logged.ACCURACY: "A path per run over its evaluations, its end marked. Further "
        "up and further left is better: more pairs told apart for less distance from "
        "the reference.",
        logged.MARGIN: "The same for margins. They contain β, so compare accuracies "
        "where runs differ in it.",
    }
    for metric, note in notes.items():
        paths = [runs.path_over_kl(run, metric) for run in several]
        if any(paths):
            figure = figures.draw_frontier(metric, paths, names)
            yield Chart(f"frontier_{_file(metric)}", figure, note)


# --- pairs -------------------------------------------------------------------------


def charts_of_pairs(pairs: Pairs, suffix: str) -> Iterator[Chart]:
    """What a trace says of all pairs together.

    Args:
        pairs: Of a run.
        suffix: Of the charts' names.
    """
    curves = trace.margin_by_step(pairs.observations)
    note = "Each pair as it was before the step that trained on it. "
    if trace.has_steps(pairs.observations):
        note += (
            "Classes that drift apart: the policy becomes sure of some pairs and turns "
            "against others."
        )
    if curves:
        yield Chart(f"pairs_margins{suffix}", figures.draw_margins(curves), note)
    yield Chart(
        f"pairs_log_ratio{suffix}",
        figures.draw_pairs(pairs.table),
        "Log-ratio: by how much more the policy has raised the log-probability of "
        "chosen than that of rejected, margin / β̃. The tail below 0 is what the table "
        "of doubtful labels begins with.",
    )


# --- numbers -----------------------------------------------------------------------


def as_json(run: Run, name: str, pairs: Pairs | None) -> dict[str, Any]:
    """All numbers of a run, as they were logged; null where one is not finite."""
    paths = {
        m.name: runs.path_over_kl(run, m) for m in (logged.ACCURACY, logged.MARGIN)
    }
    content = {
        "name": name,
        "path": str(run.path),
        "status": runs.status(run),
        "checkpoint": run.folder.name,
        "skipped": list(run.skipped),
        "steps": run.steps,
        "max_steps": run.state.get("max_steps"),
        "epoch": run.state.get("epoch"),
        "model": runs.model_name(run),
        "control": run.control,
        "controller": run.controller,
        "logged": {key: vars(series) for key, series in run.logged().items()},
        "frontier": {key: [p._asdict() for p in path] for key, path in paths.items()},
        "pairs": pairs and _pairs_as_json(pairs),
    }
    return _finite(content)


def _pairs_as_json(pairs: Pairs) -> dict[str, Any]:
    curves = trace.margin_by_step(pairs.observations)
    numbers = pairs.table.drop(columns=[*TEXTS]).reset_index()
    return {
        "observations": len(pairs.observations),
        "margin_by_step": {
            "all" if step is None else str(step): means.to_dict("list")
            for step, means in curves.items()
        },
        "pairs": numbers.to_dict("records"),
    }


def _finite(value: Any) -> Any:
    """The same with None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
