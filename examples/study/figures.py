"""The study's figures, drawn from results.json.

study_frontier   true reward against true KL, a curve per method over β
study_epsilon    β and KL over training, for each ε
study_classes    implicit reward margin over training by the pair's step s
study_flips      scores of flipped and clean pairs, and their ROC areas
study_means      β at the end with the arithmetic and with the harmonic mean
study_decisions  how often a step is right in bf16
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import summary
from grid import BASELINE, BETA, EPSILON, REFERENCE
from matplotlib.figure import Figure

from axolotl_edpo.report.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
)

STYLES = {
    "DPO": (BLACK, "s"),
    "ε-DPO": (BLUE, "o"),
    "β-DPO": (RED, "D"),
    "TR-DPO, soft": (GREEN, "^"),
    "TR-DPO, hard": (PURPLE, "v"),
}
CLASSES = {
    "1": (ORANGE, "s = +1: a smaller β separates better"),
    "-1": (BLUE, "s = −1: a larger β does"),
    "0": (BLACK, "s = 0"),
}
SCORES = {"step": "mean s", "plus": "mean Δ+ (nats)", "margin": "mean reward margin"}
SHADES = (SKY, BLUE, GREEN, ORANGE, RED, PURPLE, BLACK, "#999999")
WINDOW = 5  # kept steps


def draw(cells: Sequence[summary.Result], pictures: Path) -> list[Path]:
    """Draws all figures.

    Args:
        cells: Of a grid.
        pictures: Folder; made if absent.

    Returns:
        The files.
    """
    figures = {
        "frontier": frontier,
        "epsilon": epsilon,
        "classes": classes,
        "flips": flips,
        "means": means,
        "decisions": decisions,
    }
    return save(
        {f"study_{name}": make for name, make in figures.items()}, cells, pictures
    )


def save(
    figures: Mapping[str, Callable[[Sequence[summary.Result]], Figure]],
    cells: Sequence[summary.Result],
    pictures: Path,
) -> list[Path]:
    """Draws figures into PNG files of their names.

    Args:
        figures: Name of a file, without its ending, to what draws it.
        cells: Of a grid.
        pictures: Folder; made if absent.

    Returns:
        The files.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    files = []
    for name, make in figures.items():
        files.append(pictures / f"{name}.png")
        make(cells).savefig(files[-1])
    return files


def frontier(cells: Sequence[summary.Result]) -> Figure:
    """True reward against true KL, each method beside DPO.

    Bars are 95 % intervals over seeds. Those of the reward are of what differs within
    a seed: the level of its world, the mean of its DPO runs, is taken out.
    """
    figure = Figure(figsize=(9, 6.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    curves = summary.methods(cells)
    level = summary.levels(curves[BASELINE])
    start = summary.estimate(summary.select(cells, method=REFERENCE), "reward")
    others = [method for method in curves if method != BASELINE]
    for panel, method in zip(panels.flat, others, strict=True):
        for name in (BASELINE, method):
            _curve(panel, name, curves[name], level)
        panel.axhline(start.mean, color="grey", linestyle=":", label="reference")
        panel.set_xscale("log")
        panel.set_ylim(start.mean - 0.3, start.mean + 1)
        panel.legend(frameon=False, loc="lower left", ncols=3, fontsize=9)
        tidy(panel)
    betas = ", ".join(f"{beta:g}" for beta in sorted(curves[BASELINE], reverse=True))
    figure.suptitle(f"Reward against KL; along a curve β = {betas}")
    figure.supxlabel("KL(policy ‖ initial reference) per answer, nats")
    figure.supylabel("true reward of sampled answers")
    return figure


def _curve(panel, method: str, runs: dict[float, list], level: dict[int, float]):
    colour, marker = STYLES[method]
    x = [summary.estimate(of_beta, "kl") for of_beta in runs.values()]
    y = [summary.within_seeds(of_beta, "reward", level) for of_beta in runs.values()]
    panel.errorbar(
        [e.mean for e in x],
        [e.mean for e in y],
        xerr=_inside([e.mean for e in x], [e.half for e in x]),
        yerr=[e.half for e in y],
        color=colour,
        marker=marker,
        markersize=5,
        label=method,
        elinewidth=0.7,
    )


def epsilon(cells: Sequence[summary.Result]) -> Figure:
    """β and per-token KL of the training pairs, mean over seeds, for each ε."""
    figure, panels = _figure(2, 10, 4.2)
    runs = summary.epsilon_runs(cells)
    for colour, (value, of_value) in zip(SHADES, runs.items(), strict=False):
        for panel, name in zip(panels, ("kl/beta", "kl/policy_ref"), strict=True):
            mean = np.mean([cell["series"][name] for cell in of_value], axis=0)
            steps = 1 + summary.THIN * np.arange(len(mean))
            panel.plot(steps, _smooth(mean), color=colour, label=f"ε {value:g}")
    for panel in panels:
        panel.set_yscale("log")
        panel.set_xlabel("optimizer step")
    panels[0].set_title("KL penalty β")
    panels[1].set_title("KL(policy ‖ reference) per answer token, nats")
    panels[1].set_ylim(bottom=1e-4)
    panels[0].legend(frameon=False)
    return figure


def classes(cells: Sequence[summary.Result]) -> Figure:
    """Implicit reward margin of the pairs that have s = +1, 0 and -1 at a step."""
    figure, (panel,) = _figure(1, 8, 4.2)
    found = [cell["classes"] for cell in _closely(cells, "ε-DPO")]
    for name, (colour, label) in CLASSES.items():
        share = statistics.mean(one[name]["share"] for one in found)
        if share < 0.05:
            continue
        margins = np.array([one[name]["margin"] for one in found], dtype=float)
        label = f"{label} ({share:.0%} of visits)"
        steps = found[0]["step"]
        panel.plot(steps, margins.mean(axis=0), color=colour, marker="o", label=label)
        panel.fill_between(
            steps, margins.min(axis=0), margins.max(axis=0), color=colour, alpha=0.15
        )
    panel.axhline(0, color="grey", linestyle=":")
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("implicit reward margin")
    panel.set_title(
        f"ε {EPSILON}, β {BETA}: mean of the seeds, band from least to most"
    )
    panel.legend(frameon=False)
    return figure


def flips(cells: Sequence[summary.Result]) -> Figure:
    """Distributions of one seed, areas of all."""
    shown = [("ε-DPO", "step"), ("ε-DPO", "plus"), ("DPO", "margin")]
    figure, panels = _figure(3, 11, 3.8)
    for panel, (method, score) in zip(panels, shown, strict=True):
        runs = [cell["flips"][score] for cell in _closely(cells, method)]
        area = summary.Estimate.of([run["auc"] for run in runs])
        for name, colour in (("clean", SKY), ("flipped", RED)):
            panel.stairs(
                runs[0][name], runs[0]["edges"], color=colour, fill=True, alpha=0.55,
                label=name,
            )  # fmt: skip
        panel.set_xlabel(SCORES[score])
        panel.set_title(f"{method}: area under ROC {area.text()}", fontsize=10)
    panels[0].set_ylabel("share of pairs")
    panels[0].legend(frameon=False)
    return figure


def means(cells: Sequence[summary.Result]) -> Figure:
    """Last β for each ε, with both means."""
    figure, (panel,) = _figure(1, 8, 4.2)
    kinds = (
        ("arithmetic (paper)", summary.epsilon_runs(cells), BLUE, "o"),
        ("harmonic (released code)", summary.harmonic_runs(cells), RED, "s"),
    )
    for label, runs, colour, marker in kinds:
        last = [summary.estimate(runs[value], "last_beta") for value in runs]
        middle, half = [e.mean for e in last], [e.half for e in last]
        panel.errorbar(
            list(runs),
            middle,
            yerr=_inside(middle, half),
            color=colour,
            marker=marker,
            label=label,
            capsize=2,
        )
    panel.axhline(BETA, color="grey", linestyle=":", label="β at the start")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("ε")
    panel.set_ylabel("β after the last step")
    panel.set_title("Arithmetic and harmonic mean of β̃")
    panel.legend(frameon=False)
    return figure


def decisions(cells: Sequence[summary.Result]) -> Figure:
    """Agreement with the float64 oracle, at several distances from the reference."""
    figure, (panel,) = _figure(1, 8, 4.2)
    runs = [cell["decisions"] for cell in _closely(cells, "ε-DPO")]
    ways = {
        "ours": {"color": BLUE, "marker": "o", "markersize": 11, "linewidth": 3},
        "released, float32": {"color": ORANGE, "marker": "^", "linestyle": "--"},
        "released, bfloat16": {"color": RED, "marker": "s"},
    }
    steps = [stage["step"] for stage in runs[0]]
    for name, style in ways.items():
        shares = [[stage[name] for stage in run] for run in runs]
        panel.plot(steps, np.mean(shares, axis=0), label=name, **style)
    panel.set_xscale("log")
    panel.set_xticks(steps, [str(step) for step in steps])
    panel.minorticks_off()
    panel.set_ylim(0, 1.03)
    panel.set_xlabel("optimizer steps from the reference")
    panel.set_ylabel("share of pairs with the exact s")
    panel.set_title(f"Steps of bf16 models against float64, ε {EPSILON}")
    panel.legend(frameon=False)
    return figure


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        tidy(panel)
    return figure, axes


def tidy(panel: Any) -> None:
    """A light grid, and no frame above and beside."""
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _closely(cells: Sequence[summary.Result], method: str) -> list[summary.Result]:
    """The runs of a method that were looked at closely."""
    return summary.select(cells, group="frontier", method=method, beta=BETA)


def _inside(middle: Sequence[float], half: Sequence[float]) -> list[list[float]]:
    """Error bars that stay above 0, for a logarithmic axis."""
    below = [min(h, 0.9 * m) for m, h in zip(middle, half, strict=True)]
    return [below, list(half)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Each value the mean of up to WINDOW around it."""
    kernel = np.ones(WINDOW)
    return np.convolve(values, kernel, "same") / np.convolve(
        np.ones(len(values)), kernel, "same"
    )
