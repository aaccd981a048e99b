"""Results of a grid in one file, and what is computed over seeds.

results.json, sweep.json    every cell without its recipe's constants, numbers to four
                            digits
"""

import datetime
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cell import result_file, trace_folder
from flips import classes, read_trace, told_apart
from grid import BETA, HERE, REFERENCE, SIGNS, Cell
from scipy.stats import t as student

ROOT = HERE.parents[1]
# Of a run's series every so manieth value is kept.
THIN = 2
# Recipe keys in which cells differ.
VARIED = (
    "beta",
    "dpo_loss_type",
    "edpo_control",
    "edpo_epsilon",
    "edpo_beta_mean",
    "learning_rate",
    "rl_beta",
    "trl",
    *SIGNS,
)

Result = dict[str, Any]


class Places(NamedTuple):
    """Where the results of a grid are."""

    json: Path
    tables: Path
    pictures: Path

    @classmethod
    def of(cls, grid: str) -> "Places":
        """Two grids are in the repository; another has a folder of its own."""
        pictures = ROOT / "docs" / "pictures"
        if grid == "small":
            return cls(HERE / "results.json", HERE / "RESULTS.md", pictures)
        if grid == "sweep":
            return cls(HERE / "sweep.json", HERE / "SWEEP.md", pictures)
        own = HERE / grid
        return cls(own / "results.json", own / "RESULTS.md", own)


class Estimate(NamedTuple):
    """A mean over seeds and its interval, mean ± half (Student's t, 95 %).

    `half` is NaN with a single seed.
    """

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float], level: float = 0.95) -> "Estimate":
        """Estimate of the mean that independent values are drawn around."""
        n = len(values)
        if n < 2:
            return cls(values[0], math.nan)
        spread = statistics.stdev(values) / math.sqrt(n)
        quantile = float(student.ppf((1 + level) / 2, n - 1))
        return cls(statistics.mean(values), quantile * spread)

    def text(self, digits: int = 2) -> str:
        """`1.28 ± 0.07`."""
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"

    @property
    def is_difference(self) -> bool:
        """Whether 0 is outside the interval."""
        return abs(self.mean) > self.half


def collect(cells: Sequence[Cell], work: Path, grid: str, seconds: float) -> None:
    """Writes results.json.

    Args:
        cells: All of a grid, with results.
        work: Where they are.
        grid: Its name.
        seconds: That the study took, worlds included.
    """
    files = [result_file(work, cell) for cell in cells]
    whole = {
        "grid": grid,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": _device(),
        "versions": json.loads(files[0].read_text())["versions"],
        "minutes": seconds / 60,
        "cells": [compact(*both) for both in zip(cells, files, strict=True)],
    }
    place = Places.of(grid).json
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(_rounded(whole), separators=(",", ":")) + "\n")


def load(grid: str) -> dict[str, Any]:
    """What `collect` wrote; ends with a line that says how to make it if absent."""
    place = Places.of(grid).json
    if not place.exists():
        sys.exit(f"no {place}: run `python examples/study/run.py --grid {grid}`")
    return json.loads(place.read_text())


def select(cells: Iterable[Result], **wanted: Any) -> list[Result]:
    """Cells whose fields, or recipe keys, have these values."""
    return [
        cell
        for cell in cells
        if all(cell.get(k, cell["keys"].get(k)) == v for k, v in wanted.items())
    ]


def estimate(cells: Sequence[Result], name: str) -> Estimate:
    """A measure over the seeds of one setting."""
    return Estimate.of([cell[name] for cell in cells])


def paired(
    cells: Sequence[Result],
    others: Sequence[Result],
    name: str,
    level: float = 0.95,
) -> Estimate:
    """Difference of two settings, seed by seed: they share world, pairs and order."""
    by_seed = {cell["seed"]: cell[name] for cell in others}
    return Estimate.of([cell[name] - by_seed[cell["seed"]] for cell in cells], level)


def levels(runs: Mapping[float, Sequence[Result]]) -> dict[int, float]:
    """Mean reward of each seed's runs: how much there is to earn in its world."""
    cells = [cell for of_beta in runs.values() for cell in of_beta]
    return {
        seed: statistics.mean(cell["reward"] for cell in select(cells, seed=seed))
        for seed in {cell["seed"] for cell in cells}
    }


def within_seeds(
    cells: Sequence[Result], name: str, level: Mapping[int, float]
) -> Estimate:
    """A measure over seeds, with the interval of what is left without their levels."""
    left = Estimate.of([cell[name] - level[cell["seed"]] for cell in cells])
    return Estimate(left.mean + statistics.mean(level.values()), left.half)


def above_curve(
    cells: Sequence[Result], curve: Mapping[float, Sequence[Result]]
) -> Estimate | None:
    """How far the reward of a setting is above another method's curve at its own KL.

    The curve of a seed is piecewise linear in log KL between its runs.

    Args:
        cells: One per seed.
        curve: The other method's runs, by β.

    Returns:
        The mean over seeds; None where the KL of one is outside its curve.
    """
    found = []
    for cell in cells:
        points = sorted(
            (other["kl"], other["reward"])
            for runs in curve.values()
            for other in runs
            if other["seed"] == cell["seed"]
        )
        kls, rewards = zip(*points, strict=True)
        if not kls[0] <= cell["kl"] <= kls[-1]:
            return None
        on_curve = np.interp(math.log(cell["kl"]), np.log(kls), rewards)
        found.append(cell["reward"] - float(on_curve))
    return Estimate.of(found)


def epsilon_runs(cells: Iterable[Result]) -> dict[float, list[Result]]:
    """The runs of ε-DPO at one β with the arithmetic mean, by ε."""
    runs = [
        cell
        for cell in select(cells, method="ε-DPO", beta=BETA)
        if cell["group"] != "harmonic"
    ]
    return _by(runs, "edpo_epsilon")


def harmonic_runs(cells: Iterable[Result]) -> dict[float, list[Result]]:
    """The same with the harmonic mean."""
    return _by(select(cells, group="harmonic"), "edpo_epsilon")


def methods(
    cells: Iterable[Result], group: str = "frontier"
) -> dict[str, dict[float, list[Result]]]:
    """The runs of a group, by method and β."""
    found: dict[str, list[Result]] = {}
    for cell in select(cells, group=group):
        found.setdefault(cell["method"], []).append(cell)
    return {method: _by(runs, "beta") for method, runs in found.items()}


def _by(cells: Iterable[Result], key: str) -> dict[float, list[Result]]:
    found: dict[float, list[Result]] = {}
    for cell in sorted(cells, key=lambda cell: cell["keys"][key]):
        found.setdefault(cell["keys"][key], []).append(cell)
    return found


def compact(cell: Cell, file: Path) -> Result:
    """A cell's result without what all cells share, nor what no figure shows."""
    result = json.loads(file.read_text())
    kept = {k: v for k, v in result.items() if k not in ("name", "versions", "series")}
    kept["keys"] = {k: cell.keys[k] for k in VARIED if k in cell.keys}
    kept |= {"group": cell.group, "method": cell.method, "seed": cell.seed}
    kept["flipped_labels"] = cell.world.flipped
    if cell.method == REFERENCE:
        return kept
    series = result["series"]
    if series["kl/beta"]:
        kept["last_beta"] = series["kl/beta"][-1]
    looked_at = cell.group == "sweep" or cell.keys.get("beta") == BETA
    if cell.method == "ε-DPO" and looked_at:
        kept["series"] = {k: series[k][::THIN] for k in ("kl/beta", "kl/policy_ref")}
    if trace_folder(file).exists():
        visits = read_trace(trace_folder(file))
        kept |= {"classes": classes(visits), "flips": told_apart(visits)}
    return kept


def _rounded(value: Any) -> Any:
    """Numbers to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(names) or '?'} cores"
