"""What the trace of a run (`edpo_log_pairs: 1`) tells of its pairs.

The world knows which labels were flipped: those whose rejected answer has the higher
true reward. A trace does not, but for every visit of a pair it has three scores that
are low where the pair goes against what the policy learned:

    step      s, which is -1 where a larger β would separate the pair better
    plus      Δ+, what it separates better by when β is divided by 1 + ε
    margin    the implicit reward margin; plain DPO has it as well

A score of a pair is its mean over the visits. How well it tells flipped from clean
pairs is the area under its ROC curve: the probability that a clean pair has the higher
score of a clean and a flipped one, ties counting half.
"""

from pathlib import Path
from typing import Any

import grid  # noqa: F401  # puts ../tiny on the path
import numpy as np
import pandas as pd
from world import true_reward

SCORES = ("step", "plus", "margin")
STRETCHES = 12  # of a run, in each of which margins are averaged
BINS = 24


def read_trace(folder: Path) -> pd.DataFrame:
    """Every visit of every pair, in order, with `flipped` as the world knows it."""
    visits = pd.read_parquet(folder)
    visits = visits.sort_values("global_step", kind="stable")
    texts = visits.dropna(subset="prompt").groupby("id").first()
    flipped = [
        true_reward(row.prompt, row.chosen) < true_reward(row.prompt, row.rejected)
        for row in texts.itertuples()
    ]
    return visits.merge(
        pd.DataFrame({"flipped": flipped}, index=texts.index), on="id", how="left"
    )


def classes(visits: pd.DataFrame) -> dict[str, Any]:
    """Mean implicit reward margin over training, of the pairs of each step s.

    Returns:
        For the end of each stretch of the run, `step`, and for s of -1, 0 and 1 the
        mean `margin` (None without such a pair), the `share` of all visits and, over
        the whole run, how many of them are `flipped`. Empty where no steps are taken.
    """
    visits = visits.dropna(subset="step")
    if visits.empty:
        return {}
    last = int(visits.global_step.max())
    stretch = np.ceil(visits.global_step * STRETCHES / last).astype(int)
    found: dict[str, Any] = {"step": [last * i // STRETCHES for i in _stretches()]}
    for s in (-1, 0, 1):
        of_class = visits[visits.step == s]
        means = of_class.margin.groupby(stretch).mean()
        found[str(s)] = {
            "margin": [_number(means.get(i)) for i in _stretches()],
            "share": len(of_class) / len(visits),
            "flipped": _number(of_class.flipped.mean()),
        }
    return found


def told_apart(visits: pd.DataFrame) -> dict[str, Any]:
    """How well each score tells flipped from clean pairs.

    Returns:
        Per score that the trace has: `auc`, `edges` of a histogram and what share of
        `clean` and of `flipped` pairs is in each bin. Besides, for the pairs with
        s = -1 at every visit, `always_down`: how many, and what share is flipped.
    """
    have = [name for name in SCORES if visits[name].notna().any()]
    pairs = visits.groupby("id")[[*have, "flipped"]].mean()
    flipped = pairs.flipped > 0
    found: dict[str, Any] = {
        name: {"auc": auc(pairs[name], ~flipped), **_histogram(pairs[name], flipped)}
        for name in have
    }
    if "step" in have:
        down = pairs.step == -1
        found["always_down"] = {
            "pairs": int(down.sum()),
            "flipped": _number(flipped[down].mean()),
            "of_flipped": float((down & flipped).sum() / flipped.sum()),
        }
    return found


def auc(scores: pd.Series, positive: pd.Series) -> float:
    """Area under the ROC curve of scores that should be higher where `positive`."""
    ranks = scores.rank()
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def _histogram(scores: pd.Series, flipped: pd.Series) -> dict[str, list[float]]:
    low, high = scores.quantile([0.005, 0.995])
    edges = np.linspace(low, high, BINS + 1)
    counts = {
        name: np.histogram(scores[which].clip(low, high), edges)[0] / which.sum()
        for name, which in (("clean", ~flipped), ("flipped", flipped))
    }
    return {name: value.tolist() for name, value in counts.items()} | {
        "edges": edges.tolist()
    }


def _stretches() -> range:
    return range(1, STRETCHES + 1)


def _number(value) -> float | None:
    """A mean of nothing is no number, and JSON has no NaN."""
    return None if value is None or pd.isna(value) else float(value)
