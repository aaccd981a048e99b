"""The tests of PLAN.md: how much true reward a method loses against a tuned DPO.

R(m, β, i) is the true reward of method m at β in seed i. The tuned DPO of seed i has
the β with the highest mean of R(DPO, β, j) over the other seeds j ≠ i. The regret of m
at β in seed i is the reward of this tuned DPO in seed i, minus R(m, β, i).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grid import BASELINE
from summary import Estimate, Result, above_curve, methods, paired, select

Runs = Mapping[float, Sequence[Result]]  # by β
METHOD = "ε-DPO"
# A loss of reward below this counts as none.
MARGIN = 0.1
# 99 % for each of five comparisons is at least 95 % for all of them (Bonferroni).
LEVEL = 0.99


class AtBeta(NamedTuple):
    """What is compared at one initial β.

    Attributes:
        baseline: Regret of DPO.
        method: Regret of ε-DPO.
        difference: Reward of ε-DPO minus that of DPO, interval at LEVEL.
        at_kl: Reward of ε-DPO above DPO's curve at its KL; None outside of the curve.
    """

    baseline: Estimate
    method: Estimate
    difference: Estimate
    at_kl: Estimate | None


class Tests(NamedTuple):
    """The figures of PLAN.md for one kind of labels.

    Attributes:
        primary: Mean regret over the β: DPO's minus ε-DPO's.
        at: By initial β.
        cost: Reward of ε-DPO minus that of DPO, both at the β of the tuned DPO.
        tuned: How often each β is that of the tuned DPO.
    """

    primary: Estimate
    at: dict[float, AtBeta]
    cost: Estimate
    tuned: dict[float, int]

    @property
    def spares_the_sweep(self) -> bool:
        """Whether ε-DPO loses less than MARGIN wherever it begins."""
        return all(at.method.mean + at.method.half < MARGIN for at in self.at.values())

    @property
    def is_free(self) -> bool:
        """Whether ε-DPO loses less than MARGIN where DPO's β was tuned."""
        return self.cost.mean - self.cost.half > -MARGIN


def tests(cells: Sequence[Result], flipped: float) -> Tests:
    """Computes the figures of PLAN.md.

    Args:
        cells: Of the sweep.
        flipped: Share of flipped labels.
    """
    runs = methods(select(cells, flipped_labels=flipped), "sweep")
    base, ours = runs[BASELINE], runs[METHOD]
    betas = tuned_betas(base)
    tuned = [_run(base, beta, seed) for seed, beta in betas.items()]
    at_tuned = [_run(ours, beta, seed) for seed, beta in betas.items()]
    return Tests(
        primary=Estimate.of([_mean_gain(base, ours, seed) for seed in betas]),
        at={
            beta: AtBeta(
                paired(tuned, base[beta], "reward"),
                paired(tuned, ours[beta], "reward"),
                paired(ours[beta], base[beta], "reward", LEVEL),
                above_curve(ours[beta], base),
            )
            for beta in base
        },
        cost=paired(at_tuned, tuned, "reward"),
        tuned={b: list(betas.values()).count(b) for b in base if b in betas.values()},
    )


def tuned_betas(base: Runs) -> dict[int, float]:
    """For each seed, the β at which DPO is best in the mean of the other seeds."""
    seeds = sorted(cell["seed"] for cell in next(iter(base.values())))

    def mean_of_others(beta: float, seed: int) -> float:
        rewards = [c["reward"] for c in base[beta] if c["seed"] != seed]
        return statistics.mean(rewards)

    return {s: max(base, key=lambda b: mean_of_others(b, s)) for s in seeds}


def _mean_gain(base: Runs, ours: Runs, seed: int) -> float:
    """Mean over β of ε-DPO's reward minus DPO's; the tuned DPO cancels."""
    return statistics.mean(
        _run(ours, beta, seed)["reward"] - _run(base, beta, seed)["reward"]
        for beta in base
    )


def _run(runs: Runs, beta: float, seed: int) -> Result:
    (found,) = select(runs[beta], seed=seed)
    return found
