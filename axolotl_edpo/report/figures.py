"""Charts of runs and pairs. Each is a matplotlib figure with one panel.

The colours are those of Okabe and Ito, which colour-blind people can distinguish. Lines
and markers differ too, so charts can be read without colour. Text stays text in SVG.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import logged
from .logged import EVAL, Metric
from .runs import Evaluation, Run, Series, Warned

if TYPE_CHECKING:
    from pandas import DataFrame

BLUE, RED, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#666666"
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Colour, line and name of pairs with s = +1, 0, -1.
ASKED = {
    1: (RED, "-", "smaller: +1"),
    0: (GREY, ":", "same: 0"),
    -1: (BLUE, "--", "larger: −1"),
}
STEP = "optimizer step"
SIZE = (5.0, 3.1)  # inches: wide enough for a phone, twice on a desktop
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.labelcolor": "#444444",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs may hold dollars
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


class Look(NamedTuple):
    """Colour, line and marker of a run in charts that compare runs."""

    colour: str
    line: str
    marker: str


def looks(count: int) -> list[Look]:
    """Looks for `count` runs. The first four differ in colour, line and marker."""
    styles = zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
    return [Look(*style) for style in islice(styles, count)]


def window(count: int) -> int:
    """The width of the moving average that smooths a curve, an odd number.

    Args:
        count: Number of values of the curve.
    """
    return 2 * (count // 16) + 1


def smooth(values: Sequence[float], width: int) -> list[float]:
    """A moving average over `width` values, centred, with fewer values near both ends.

    The first value is not averaged: curves that compare policy and reference start at
    0.
    """
    means = []
    for i in range(len(values)):
        half = min(width // 2, i)
        near = values[i - half : i + half + 1]
        means.append(sum(near) / len(near))
    return means


@contextmanager
def _panel(title: str, x_label: str = STEP) -> Iterator[tuple[Figure, Axes]]:
    """Yields a figure and its panel; at the end adds a legend below the panel."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_xlabel(x_label)
        if x_label == STEP:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        yield figure, axes
        _add_legend(figure, axes)


def _add_legend(figure: Figure, axes: Axes) -> None:
    """A legend with as many columns as the longest name leaves room for."""
    _, names = axes.get_legend_handles_labels()
    longest = max(map(len, names))
    columns = 3 if longest < 14 else 2 if longest < 28 else 1
    rows = -(-len(names) // columns)
    figure.set_figheight(SIZE[1] + 0.17 * (rows - 1))
    figure.legend(loc="outside lower left", ncols=columns, handlelength=2.6)


def _draw_line(axes: Axes, x, y, line: str, colour: str, name: str) -> None:
    """A line, with markers if it has fewer than three points."""
    marker = "." if len(x) < 3 else None
    axes.plot(x, y, line, color=colour, marker=marker, label=name)


def _smooth_width(metric: Metric, series: Series) -> int:
    return 1 if metric in logged.EXACT else window(len(series.steps))


def draw_metric(metric: Metric, run: Run) -> Figure:
    """A metric of one run: a smooth line over training values, evaluations as dots.

    Sets of `test_datasets:` have a thin line each. A vertical line marks each warning
    that the metric shows.
    """
    train, held_out = run.series(metric.name), run.series(EVAL + metric.name)
    with _panel(metric.label) as (figure, axes):
        if train:
            _smooth_over_raw(axes, train, metric)
        if held_out:
            axes.plot(
                held_out.steps,
                held_out.values,
                "o",
                color=RED,
                markeredgecolor="white",
                label="evaluation",
            )
        _draw_sets(axes, run.of_sets(metric))
        _mark_warnings(axes, run.marks(metric), BLACK)
    return figure


def _draw_sets(axes: Axes, sets: dict[str, Series]) -> None:
    """A thin line with markers for each set of `test_datasets:`."""
    colours = cycle((GREEN, PURPLE, ORANGE, SKY))
    for (name, series), colour, marker in zip(
        sets.items(), colours, cycle(MARKERS[1:]), strict=False
    ):
        axes.plot(
            series.steps,
            series.values,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1,
            label=f"evaluation, {name}",
        )


def _mark_warnings(axes: Axes, warnings: Sequence[Warned], colour: str) -> None:
    """A vertical line at each step with warnings, with their names beside it."""
    names: dict[int, list[str]] = {}
    for warning in warnings:
        names.setdefault(warning.step, []).append(warning.name)
    for step, of_step in names.items():
        axes.axvline(step, color=colour, linestyle=":", linewidth=1.2)
        axes.annotate(
            f"{', '.join(of_step)}: step {step}",
            (step, 1),
            (-3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=8,
            color=colour,
            bbox={
                "boxstyle": "square,pad=0.1",
                "fc": "white",
                "ec": "none",
                "alpha": 0.7,
            },
        )


def _smooth_over_raw(axes: Axes, train: Series, metric: Metric) -> None:
    width, name = _smooth_width(metric, train), "training"
    if width > 1:
        axes.plot(train.steps, train.values, color=BLUE, alpha=0.25, linewidth=0.9)
        name += f", mean of {width} logs"
    _draw_line(axes, train.steps, smooth(train.values, width), "-", BLUE, name)


def draw_shares(run: Run) -> Figure:
    """The shares of pairs with s = +1, 0 and -1 in one run, over its steps."""
    with _panel("Share of pairs by s, the β they ask for") as (figure, axes):
        for prefix, as_dots in (("", False), (EVAL, True)):
            for step, share in _shares(run, prefix).items():
                _draw_share(axes, share, step, as_dots)
        axes.set_ylim(-0.03, 1.03)
    return figure


def _shares(run: Run, prefix: str) -> dict[int, Series]:
    metrics = logged.SMALLER, logged.LARGER
    smaller, larger = (run.series(prefix + metric.name) for metric in metrics)
    if not smaller or not larger:
        return {}
    both = zip(smaller.values, larger.values, strict=True)
    same = [1 - sum(shares) for shares in both]
    return {1: smaller, 0: Series(smaller.steps, same), -1: larger}


def _draw_share(axes: Axes, share: Series, step: int, as_dots: bool) -> None:
    colour, line, name = ASKED[step]
    if as_dots:
        axes.plot(share.steps, share.values, "o", color=colour, markersize=4)
        return
    values = smooth(share.values, window(len(share.steps)))
    _draw_line(axes, share.steps, values, line, colour, name)


def draw_runs(metric: Metric, several: Sequence[Run], names: Sequence[str]) -> Figure:
    """A metric of several runs: smooth training lines, evaluations as markers.

    A vertical line in the run's colour marks each warning that the metric shows.
    """
    with _panel(metric.label) as (figure, axes):
        for run, name, look in zip(several, names, looks(len(names)), strict=True):
            train, held_out = run.series(metric.name), run.series(EVAL + metric.name)
            if train:
                values = smooth(train.values, _smooth_width(metric, train))
                _draw_line(axes, train.steps, values, look.line, look.colour, name)
            if held_out:
                label = None if train else name
                _mark(axes, held_out.steps, held_out.values, look, label=label)
            _mark_warnings(axes, run.marks(metric), look.colour)
    return figure


def _mark(axes: Axes, x, y, look: Look, **more) -> None:
    """Small markers with a white edge, so that a line below stays visible."""
    style = {"linestyle": "", "markersize": 5, "markeredgecolor": "white", **more}
    axes.plot(x, y, marker=look.marker, color=look.colour, **style)


def draw_frontier(
    metric: Metric, paths: Sequence[Sequence[Evaluation]], names: Sequence[str]
) -> Figure:
    """A metric over the distance from the reference: a path per run.

    Args:
        metric: The metric.
        paths: A path per run over its evaluations; an empty one is not drawn.
        names: A name for each run.
    """
    x_label = "KL(π‖π_ref) per token, nats"
    with _panel(f"{metric.label} over KL", x_label) as (figure, axes):
        for path, name, look in zip(paths, names, looks(len(names)), strict=True):
            if path:
                x = [point.kl for point in path]
                y = [point.gain for point in path]
                line = {"linestyle": look.line, "linewidth": 1.2, "markersize": 4}
                _mark(axes, x, y, look, **line)
                last = {"markersize": 10, "markeredgecolor": BLACK, "label": name}
                _mark(axes, x[-1:], y[-1:], look, **last)
    return figure


def draw_margins(curves: "dict[int | None, DataFrame]") -> Figure:
    """Mean margins over steps, a curve per value of s.

    Args:
        curves: Table of each s, or of all pairs for None; see `trace.margin_by_step`.
    """
    classes = "" if None in curves else ", by the β they ask for"
    with _panel(f"Mean margin of traced pairs{classes}") as (figure, axes):
        for step, means in curves.items():
            colour, line, name = ASKED[step] if step is not None else (BLUE, "-", "all")
            x, y = means["global_step"], means["margin"]
            _draw_line(axes, x, y, line, colour, name)
    return figure


def draw_pairs(pairs: "DataFrame") -> Figure:
    """A histogram of the pairs' mean log-ratios, coloured by the sign of their mean s.

    Args:
        pairs: One row per pair, see `trace.by_pair`.
    """
    groups, x_label = _by_asked(pairs), "nats, chosen minus rejected"
    with _panel("Pairs by mean log-ratio", x_label) as (figure, axes):
        axes.hist(
            [group["log_ratio"] for group, *_ in groups],
            bins=min(40, 8 + len(pairs) // 20),
            stacked=True,
            color=[colour for _, colour, _ in groups],
            label=[name for *_, name in groups],
            edgecolor="white",
            linewidth=0.3,
        )
        axes.set_ylabel("pairs")
    return figure


def _by_asked(pairs: "DataFrame") -> list[tuple["DataFrame", str, str]]:
    """Pairs grouped by the sign of their mean s; each group with colour and name."""
    steps = pairs["mean_step"]
    if steps.isna().all():
        return [(pairs, BLUE, "all")]
    groups = [
        (pairs[steps > 0], RED, "mostly smaller β"),
        (pairs[steps == 0], GREY, "neither"),
        (pairs[steps < 0], BLUE, "mostly larger β"),
    ]
    return [group for group in groups if len(group[0])]


def as_svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element of a page.

    Args:
        figure: The figure.
        name: Unique in the page. The ids in the element are derived from it, so they
            are unique in the page, and the same in every run of the command.
    """
    file = StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    _, start, element = file.getvalue().partition("<svg")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element)
    return start + re.sub(r'<g id="[^"]*"', "<g", element)


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png")
    return file.getvalue()
