"""The figures of the second study, drawn from sweep.json.

sweep_reward    true reward against initial β, and what ε-DPO gains over DPO
sweep_frontier  true reward against true KL
sweep_beta      β of ε-DPO over the run, by initial β
"""

from collections.abc import Sequence
from pathlib import Path

import figures
import numpy as np
import summary
from grid import BASELINE, REFERENCE
from matplotlib.figure import Figure
from regret import LEVEL, METHOD, tests
from summary import Result, estimate, methods, select, within_seeds
from sweep import LABELS, METHODS, SWEEP

from axolotl_edpo.report.figures import BLACK, GREEN

STYLES = {**figures.STYLES, "TR-DPO": (GREEN, "^")}
LOGGED = SWEEP.recipe["logging_steps"] * summary.THIN  # steps from value to value


def draw(cells: Sequence[Result], pictures: Path) -> list[Path]:
    """Draws all figures.

    Args:
        cells: Of the sweep.
        pictures: Folder; made if absent.

    Returns:
        The files.
    """
    drawn = {"sweep_reward": reward, "sweep_frontier": frontier, "sweep_beta": beta}
    return figures.save(drawn, cells, pictures)


def reward(cells: Sequence[Result]) -> Figure:
    """Reward of DPO and ε-DPO above, their difference below; a column per labels.

    Bars of rewards are of what differs within a seed, those of differences are 99 %.
    """
    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    rows = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 2))
    for (label, title), above, below in zip(LABELS.items(), *rows, strict=True):
        of_label = select(cells, flipped_labels=label)
        runs = methods(of_label, "sweep")
        level = summary.levels(runs[BASELINE])
        for method in (BASELINE, METHOD):
            found = [within_seeds(r, "reward", level) for r in runs[method].values()]
            _line(above, method, list(runs[method]), found)
        start = estimate(select(of_label, method=REFERENCE), "reward")
        above.axhline(start.mean, color="grey", linestyle=":", label="initial model")
        above.set_title(title)
        at = tests(cells, label).at
        _line(below, METHOD, list(at), [one.difference for one in at.values()])
        below.axhline(0, color=BLACK, linewidth=1)
        below.set_xlabel("initial β")
        below.set_xscale("log")
        for panel in (above, below):
            figures.tidy(panel)
    rows[0][0].set_ylabel("true reward")
    rows[1][0].set_ylabel(f"ε-DPO − DPO ({LEVEL:.0%})")
    rows[0][0].legend(frameon=False)
    return figure


def frontier(cells: Sequence[Result]) -> Figure:
    """Each method's curve over β; a panel per labels."""
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for (label, title), panel in zip(LABELS.items(), panels, strict=True):
        runs = methods(select(cells, flipped_labels=label), "sweep")
        for method in METHODS:
            colour, marker = STYLES[method]
            means = [
                [estimate(of_beta, name).mean for of_beta in runs[method].values()]
                for name in ("kl", "reward")
            ]
            few = "" if method in (BASELINE, METHOD) else f", {SWEEP.fewer_seeds} seeds"
            label_ = f"{method}{few}"
            panel.plot(*means, color=colour, marker=marker, label=label_)
        panel.set_xscale("log")
        panel.set_title(title)
        panel.set_xlabel("KL(policy ‖ initial model) per answer, nats")
        figures.tidy(panel)
    panels[0].set_ylabel("true reward")
    panels[0].legend(frameon=False)
    return figure


def beta(cells: Sequence[Result]) -> Figure:
    """β divided by the initial β, mean over seeds, a curve per initial β."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (label, title), panel in zip(LABELS.items(), panels, strict=True):
        runs = methods(select(cells, flipped_labels=label), "sweep")[METHOD]
        for colour, (initial, of_beta) in zip(
            figures.SHADES, runs.items(), strict=False
        ):
            mean = np.mean([run["series"]["kl/beta"] for run in of_beta], axis=0)
            steps = SWEEP.recipe["logging_steps"] + LOGGED * np.arange(len(mean))
            panel.plot(steps, mean / initial, color=colour, label=f"{initial:g}")
        panel.set_yscale("log")
        panel.set_title(title)
        panel.set_xlabel("optimizer step")
        figures.tidy(panel)
    panels[0].set_ylabel("β / initial β")
    panels[0].legend(frameon=False, title="initial β")
    return figure


def _line(panel, method: str, x: list[float], y: list[summary.Estimate]) -> None:
    colour, marker = STYLES[method]
    panel.errorbar(
        x,
        [one.mean for one in y],
        yerr=[one.half for one in y],
        color=colour,
        marker=marker,
        label=method,
        capsize=3,
    )
