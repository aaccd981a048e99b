"""The cells of the second study: does ε-DPO spare the sweep over β?

    trial    DPO at several learning rates, on worlds that are not graded
    sweep    each method at β₀ over two decades, with clean labels and with flipped ones
    table1   the losses of the paper's Table 1 at three settings each, flipped labels

PLAN.md has the question, and what counts as an answer. It was written before the runs.
"""

from dataclasses import dataclass
from typing import Any

from grid import BASELINE, EPSILON, REFERENCE, Cell, Training, build, moving_reference

FIXED = {"edpo_control": "fixed"}
# KTO is axolotl's: it compares no pairs, so its rows are single answers.
KTO = {
    "rl": "kto",
    "plugins": [],
    "sample_packing": False,
    "remove_unused_columns": False,
}
FLIPPED = 0.2
# Share of flipped labels -> its name on the page.
LABELS = {0.0: "clean labels", FLIPPED: f"{FLIPPED:.0%} flipped"}
# Of methods with a reference, β₀ in the sweep.
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
METHODS: dict[str, dict[str, Any]] = {
    BASELINE: FIXED,
    "ε-DPO": {"edpo_epsilon": EPSILON},
    "β-DPO": {"edpo_control": "batch_margin"},
    "TR-DPO": FIXED | moving_reference(0.6, 128),
}
# The two methods that the plan compares.
DECIDING = (BASELINE, "ε-DPO")
# Losses of Table 1 that are not in the sweep -> three settings of each.
LOSSES: dict[str, list[dict[str, Any]]] = {
    "IPO": [{"beta": b, "dpo_loss_type": ["ipo"]} for b in (0.1, 0.3, 1.0)],
    "CPO": [{"beta": b, "dpo_loss_type": ["cpo"]} for b in (0.3, 1.0, 3.0)],
    "SLiC-HF": [
        {"edpo_slic_delta": d, "dpo_loss_type": ["slic"]} for d in (0.5, 2.0, 10.0)
    ],
    "RRHF": [{"cpo_alpha": a, "dpo_loss_type": ["rrhf"]} for a in (0.1, 0.5, 1.0)],
    "KTO": [KTO | {"rl_beta": b} for b in (0.3, 1.0, 3.0)],
    "ORPO": [{"orpo_alpha": a, "dpo_loss_type": ["orpo"]} for a in (0.1, 0.5, 2.0)],
    "R-DPO": [{"beta": 1.0, "edpo_length_penalty": a} for a in (0.05, 0.1, 0.5)],
    "SimPO": [
        {"beta": b, "simpo_gamma": g, "dpo_loss_type": ["simpo"]}
        for b, g in ((2.5, 0.3), (2.5, 1.4), (10.0, 3.0))
    ],
}


@dataclass(frozen=True, kw_only=True)
class Sweep(Training):
    """The cells of the second study.

    Attributes:
        seeds: Of the two methods that decide.
        fewer_seeds: Of the others.
        betas: β₀ of the sweep.
        trial_seeds: Of the worlds on which the learning rate was chosen; the first has
            clean labels, the second flipped ones.
        trial_rates: Learning rates that were tried.
        trial_betas: β that each of them was tried with.
    """

    seeds: int = 8
    fewer_seeds: int = 3
    betas: tuple[float, ...] = BETAS
    trial_seeds: tuple[int, ...] = (100, 101)
    trial_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
    trial_betas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)

    def trials(self) -> list[Cell]:
        """DPO at each learning rate and β, on worlds of the trials."""
        return [
            self.cell(
                seed,
                "trial",
                BASELINE,
                FIXED | {"beta": beta, "learning_rate": rate},
                flipped=flipped,
            )
            for seed, flipped in zip(self.trial_seeds, LABELS, strict=True)
            for rate in self.trial_rates
            for beta in self.trial_betas
        ]

    def cells(self) -> list[Cell]:
        """Trials, then seed by seed: an unfinished study is one of few seeds."""
        cells = self.trials()
        for seed in range(self.seeds):
            for flipped in LABELS:
                cells += self._sweep(seed, flipped)
            if seed < self.fewer_seeds:
                cells += self._table(seed)
        return cells

    def _sweep(self, seed: int, flipped: float) -> list[Cell]:
        names = METHODS if seed < self.fewer_seeds else DECIDING
        return [
            self.cell(seed, REFERENCE, REFERENCE, {}, flipped=flipped),
            *(
                self.cell(
                    seed,
                    "sweep",
                    name,
                    METHODS[name] | {"beta": beta},
                    flipped=flipped,
                )
                for name in names
                for beta in self.betas
            ),
        ]

    def _table(self, seed: int) -> list[Cell]:
        return [
            self.cell(seed, "table1", name, self._whole(keys), flipped=FLIPPED)
            for name, settings in LOSSES.items()
            for keys in settings
        ]

    def _whole(self, keys: dict[str, Any]) -> dict[str, Any]:
        """All keys of a loss of Table 1. A step of KTO has as many answers."""
        if keys.get("rl") == "kto":
            return keys | {"micro_batch_size": 2 * self.step_pairs}
        return FIXED | keys


SWEEP = Sweep(
    world=build.Settings(hidden_size=96, train_pairs=3760, rounds=2),
    epochs=1,
    step_pairs=8,
    learning_rate=4e-4,
    recipe={"warmup_steps": 47, "logging_steps": 10},
)
