"""The cells of the study: which worlds, which recipes, which seeds.

A cell is one run: a world (language model and pairs, see ../tiny/build.py), what a
recipe says besides it, and how many answers the trained policy is graded by. A seed
changes everything that is random: the world's language model, its pairs and which of
them are flipped, the order in which they are trained on, and the sampled answers.

    frontier   each method at each β: true reward against true KL
    epsilon    ε-DPO at one β with other ε
    harmonic   the same with the mean of the authors' code
    reference  nothing is trained: what the others are compared with
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tiny"))

import build  # noqa: E402

# What all recipes share.
RECIPE: dict[str, Any] = {
    "plugins": ["axolotl_edpo.EDPOPlugin"],
    "rl": "edpo",
    "chat_template": "tokenizer_default",
    "sequence_len": 128,
    "sample_packing": True,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "max_grad_norm": 1.0,
    "attn_implementation": "sdpa",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "dataset_num_proc": 0,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "save_strategy": "no",
}
TRACE = {"edpo_log_pairs": 1}
# A policy every five steps, to look at decisions early and late.
POLICIES = {
    "save_strategy": "steps",
    "save_steps": 5,
    "save_only_model": True,
    "save_total_limit": 1000,  # axolotl's default keeps four
}
REFERENCE, BASELINE = "reference", "DPO"
EPSILON, BETA = 0.01, 0.1
# Keys of losses in the names of cells.
SIGNS = {
    "cpo_alpha": "α",
    "edpo_length_penalty": "α",
    "edpo_slic_delta": "δ",
    "orpo_alpha": "λ",
    "simpo_gamma": "γ",
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        group: What of the study it belongs to.
        method: Its curve in figures; `reference` trains nothing.
        seed: Of the recipe; that of the world is the same.
        world: Language model and pairs.
        keys: Of the recipe, besides paths.
        answers: How many are sampled to each held-out prompt.
    """

    group: str
    method: str
    seed: int
    world: build.Settings
    keys: dict[str, Any]
    answers: int

    @property
    def name(self) -> str:
        """For people: `ε-DPO β 0.1 ε 0.01, seed 0`."""
        keys = {"beta": "β", "edpo_epsilon": "ε", "edpo_beta_mean": "", **SIGNS}
        said = [f"{sign} {self.keys[k]}" for k, sign in keys.items() if k in self.keys]
        return f"{' '.join([self.method, *said])}, seed {self.seed}"

    def digest(self) -> str:
        """Names the result: recipe, world with its code, seed and number of answers.

        Of this package and of axolotl a result only notes the versions: a changed
        comment does not cost an hour.
        """
        what = [self.keys, build.manifest(self.world), self.seed, self.answers]
        text = json.dumps(what, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all cells of a grid share.

    Attributes:
        world: Language model and pairs; the seed is the cell's.
        epochs: Visits of each pair.
        step_pairs: Pairs of an optimizer step.
        learning_rate: At its highest.
        answers: Sampled to each held-out prompt.
        recipe: Further recipe keys.
    """

    world: build.Settings
    epochs: int
    step_pairs: int
    learning_rate: float
    answers: int = 4
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return -(-self.world.train_pairs // self.step_pairs) * self.epochs

    def cell(
        self, seed: int, group: str, method: str, keys: dict[str, Any], **world: Any
    ) -> Cell:
        """A run with these recipe keys.

        Args:
            seed: Of world and recipe.
            group: What of the study it belongs to.
            method: Its name in tables; `reference` trains nothing.
            keys: Of the recipe; they win over what is shared.
            world: Settings of the world that differ from the grid's.
        """
        built = replace(self.world, seed=seed, **world)
        shared = {
            "seed": seed,
            "num_epochs": self.epochs,
            "micro_batch_size": self.step_pairs,
            "learning_rate": self.learning_rate,
            "warmup_steps": max(1, self.steps // 20),
        }
        if group != REFERENCE:
            keys = {**RECIPE, **shared, **self.recipe, **keys}
        return Cell(group, method, seed, built, keys, self.answers)


@dataclass(frozen=True, kw_only=True)
class Grid(Training):
    """The cells of the first study; the defaults are the small grid."""

    seeds: int = 4
    betas: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5, 2.0)
    epsilons: tuple[float, ...] = (0.005, 0.02, 0.05, 0.2, 0.5)
    harmonic: tuple[float, ...] = (0.01, 0.05, 0.2)
    world: build.Settings = build.Settings(train_pairs=1024, flipped=0.2)
    epochs: int = 2
    step_pairs: int = 16
    learning_rate: float = 4e-4

    def cells(self) -> list[Cell]:
        """Every cell, seed by seed, so that an unfinished study is one of few seeds."""
        return [
            cell
            for seed in range(self.seeds)
            for cell in (
                self.cell(seed, REFERENCE, REFERENCE, {}),
                *self._frontier(seed),
                *self._epsilons(seed),
            )
        ]

    def methods(self) -> dict[str, dict[str, Any]]:
        """The recipe keys of each curve of the frontier."""
        fixed = {"edpo_control": "fixed"}
        return {
            BASELINE: fixed,
            "ε-DPO": {"edpo_epsilon": EPSILON},
            "β-DPO": {"edpo_control": "batch_margin"},
            "TR-DPO, soft": fixed | moving_reference(0.6, max(1, self.steps // 12)),
            "TR-DPO, hard": fixed | moving_reference(1.0, max(1, self.steps // 3)),
        }

    def _frontier(self, seed: int) -> list[Cell]:
        return [
            self.cell(seed, "frontier", method, self._extras(method, beta) | keys)
            for method, keys in self.methods().items()
            for beta in self.betas
        ]

    def _extras(self, method: str, beta: float) -> dict[str, Any]:
        """β, and what the runs that are looked at closely keep."""
        extras: dict[str, Any] = {"beta": beta}
        if beta == BETA and method in ("DPO", "ε-DPO"):
            extras |= TRACE
        if beta == BETA and method == "ε-DPO":
            extras |= POLICIES
        return extras

    def _epsilons(self, seed: int) -> list[Cell]:
        arithmetic = [{"edpo_epsilon": e} | TRACE for e in self.epsilons]
        harmonic = [
            {"edpo_epsilon": e, "edpo_beta_mean": "harmonic"} for e in self.harmonic
        ]
        return [
            self.cell(seed, group, "ε-DPO", {"beta": BETA} | keys)
            for group, all_keys in (("epsilon", arithmetic), ("harmonic", harmonic))
            for keys in all_keys
        ]


def moving_reference(mixup: float, every: int) -> dict[str, Any]:
    """TR-DPO: every so many steps the reference takes a share of the policy."""
    return {
        "trl": {
            "sync_ref_model": True,
            "ref_model_mixup_alpha": mixup,
            "ref_model_sync_steps": every,
        }
    }


# For one GPU: 35 million parameters, more pairs, seeds and answers. Never measured.
LARGE = Grid(
    seeds=8,
    betas=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    epsilons=(0.002, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5),
    harmonic=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    world=build.Settings(
        hidden_size=576,
        layers=8,
        steps=2000,
        batch_size=32,
        train_pairs=2048,
        flipped=0.2,
    ),
    answers=16,
    recipe={"learning_rate": 1e-4},
)
GRIDS: dict[str, Grid] = {"small": Grid(), "large": LARGE}
