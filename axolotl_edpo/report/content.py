"""The content of a report: charts with captions, or numbers for JSON."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..run_files import TEXTS, THUMBNAILS
from . import figures, logged, runs, trace
from .logged import Metric
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
        name: Name of its PNG file, without `.png`.
        figure: The figure.
        caption: How to read the figure.
    """

    name: str
    figure: "Figure"
    caption: str


@dataclass(frozen=True)
class Pairs:
    """The traced pairs of a run.

    Attributes:
        observations: One row per observation, see `trace.read_trace`.
        table: One row per pair, see `trace.by_pair`.
    """

    observations: "DataFrame"
    table: "DataFrame"


@dataclass(frozen=True)
class Scored:
    """What `axolotl edpo-score` wrote into one file.

    Attributes:
        name: Name of the file, without ending.
        summary: Model, β, and scores of all pairs and of each set.
        pairs: The pairs, each observed once.
    """

    name: str
    summary: dict[str, Any]
    pairs: Pairs


def read_pairs(run: Run) -> Pairs | None:
    """Reads the traced pairs of a run; None without a trace.

    Raises:
        ValueError: Names a file that is damaged.
    """
    observations = trace.read_trace(run.output_dir, run.steps)
    if observations is None:
        return None
    return Pairs(observations, trace.by_pair(observations))


def read_scores(run: Run) -> list[Scored]:
    """Reads the scores of a run, by the names of their files.

    Raises:
        ValueError: Names a file that is damaged, or that something else wrote.
    """
    return [
        Scored(name, summary, Pairs(rows, trace.by_pair(rows)))
        for name, summary, rows in trace.read_scores(run.output_dir)
    ]


# --- one run -----------------------------------------------------------------------


def charts_of_run(run: Run) -> Iterator[Chart]:
    """Yields the charts of a single run: a curve per logged metric."""
    if run.has(logged.BETA):
        yield _curve(run, logged.BETA)
    if run.has(logged.SMALLER):
        yield Chart(
            "shares",
            figures.draw_shares(run),
            "Smaller β: chosen and rejected separate better under a smaller one; the "
            "pair is let go. Larger β: under a larger one; the pair goes against what "
            "the policy has learned. Lines: training; dots: evaluation.",
        )
    for metric in CURVES:
        if run.has(metric):
            yield _curve(run, metric)


def _curve(run: Run, metric: Metric) -> Chart:
    figure = figures.draw_metric(metric, run)
    return Chart(_file_name(metric), figure, metric.note)


def _file_name(metric: Metric) -> str:
    return metric.name.replace("/", "_")


# --- several -----------------------------------------------------------------------


def charts_of_runs(several: Sequence[Run], names: Sequence[str]) -> Iterator[Chart]:
    """Yields charts that compare runs: metrics over KL, then a chart per metric.

    Args:
        several: The runs.
        names: A name for each run.
    """
    yield from _frontier(several, names)
    for metric in COMPARED:
        if any(run.has(metric) for run in several):
            figure = figures.draw_runs(metric, several, names)
            yield Chart(_file_name(metric), figure, metric.note)


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
            yield Chart(f"frontier_{_file_name(metric)}", figure, note)


# --- pairs -------------------------------------------------------------------------


def charts_of_pairs(pairs: Pairs, suffix: str) -> Iterator[Chart]:
    """Yields charts of the traced pairs of a run.

    Args:
        pairs: The traced pairs.
        suffix: Appended to the names of the charts, which differ between runs.
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
    yield chart_of_ratios(pairs, f"pairs_log_ratio{suffix}")


def chart_of_ratios(pairs: Pairs, name: str) -> Chart:
    """How far pairs are told apart.

    Args:
        pairs: The pairs.
        name: Of the chart.
    """
    return Chart(
        name,
        figures.draw_pairs(pairs.table),
        "Log-ratio: by how much more the policy has raised the log-probability of "
        "chosen than that of rejected, margin / β̃. The tail below 0 is what the table "
        "of doubtful labels begins with.",
    )


# --- numbers -----------------------------------------------------------------------


def as_json(
    run: Run, name: str, pairs: Pairs | None, scores: Sequence[Scored]
) -> dict[str, Any]:
    """All numbers of a run, for JSON. None replaces NaN and infinities.

    Args:
        run: The run.
        name: Its name in the report.
        pairs: Its traced pairs, or None.
        scores: Its scores.
    """
    paths = {
        metric.name: runs.path_over_kl(run, metric)
        for metric in (logged.ACCURACY, logged.MARGIN)
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
        "frontier": {
            key: [point._asdict() for point in path] for key, path in paths.items()
        },
        "warnings": [vars(warning) for warning in run.warnings],
        "pairs": pairs and _pairs_as_json(pairs),
        "scores": {
            scored.name: scored.summary | {"pairs": _records(scored.pairs)}
            for scored in scores
        },
    }
    return _finite(content)


def _pairs_as_json(pairs: Pairs) -> dict[str, Any]:
    curves = trace.margin_by_step(pairs.observations)
    return {
        "observations": len(pairs.observations),
        "margin_by_step": {
            "all" if step is None else str(step): means.to_dict("list")
            for step, means in curves.items()
        },
        "pairs": _records(pairs),
    }


def _records(pairs: Pairs) -> list[dict[str, Any]]:
    numbers = pairs.table.drop(columns=[*TEXTS, THUMBNAILS]).reset_index()
    return numbers.to_dict("records")


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities by None, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
