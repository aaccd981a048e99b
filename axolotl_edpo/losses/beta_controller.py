"""β as trainer state: one controller per `edpo_control`, all with the same few moves.

    epsilon       ε-DPO: every pair a β̃ of its own; β is their mean, step by step
    fixed         DPO: β₀ throughout
    batch_margin  β-DPO: β of a step by the mean margin of its pairs, against its
                  moving average M₀ (Wu et al., https://arxiv.org/abs/2407.08639)

    settings      what the recipe says, never changes
    state         β, and what the next one is made of

A step is `begin` where β follows margins, `observe` per micro-batch, `pair_betas` for
the loss, and `advance` at its end, by what all ranks `observed`. State is small and
explicit, as of a learning-rate plateau controller, and the same on every rank to the
last bit: counts are integers, and sums of margins are rounded once (`math.fsum`), in
whatever order they come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import stdev
from typing import Any, Literal

import torch

from . import edpo as loss
from .edpo import BetaMean

Control = Literal["epsilon", "fixed", "batch_margin"]


@dataclass(frozen=True)
class ControllerSettings:
    """What the recipe says.

    Attributes:
        beta: β₀ > 0.
        epsilon: ε of `epsilon`, 0 < ε < 1.
        beta_mean: The mean of Eq. 6, of `epsilon`.
        control: Which controller.
        margin_weight: α of `batch_margin`, >= 0, per nat.
        margin_momentum: Of its moving averages, from 0 to below 1.
        margin_keep: ρ, the share of a step's pairs that it trains on, up to 1: all.
    """

    beta: float
    epsilon: float = 0.01
    beta_mean: BetaMean = "arithmetic"
    control: Control = "epsilon"
    margin_weight: float = 0.6
    margin_momentum: float = 0.9
    margin_keep: float = 1.0

    @classmethod
    def of(cls, cfg: Any, beta: float) -> "ControllerSettings":
        """Those of a recipe.

        Args:
            cfg: axolotl's config.
            beta: β₀.
        """
        return cls(
            beta,
            epsilon=cfg.edpo_epsilon,
            beta_mean=cfg.edpo_beta_mean,
            control=cfg.edpo_control,
            margin_weight=cfg.edpo_margin_weight,
            margin_momentum=cfg.edpo_margin_momentum,
            margin_keep=cfg.edpo_margin_keep,
        )


class BetaController:
    """Holds β; nothing else does. This one is `fixed`, the others move it.

    Args:
        settings: Of the run.

    Attributes:
        beta: β of the step, > 0.
        epsilon: Perturbation that the head has to compute, or None.
    """

    epsilon: float | None = None
    # the fields of the settings that this controller reads, beside β₀
    _reads: tuple[str, ...] = ()

    def __init__(self, settings: ControllerSettings):
        self.settings = settings
        self.reset()

    def pair_betas(self, steps: torch.Tensor) -> torch.Tensor:
        """β̃ of each pair.

        Args:
            steps: Shape (pairs,), int64, values in {-1, 0, +1}.

        Returns:
            Shape (pairs,), float32, positive.
        """
        return torch.full_like(steps, self.beta, dtype=torch.float32)

    def observe(self, steps: torch.Tensor) -> None:
        """Takes note of one micro-batch; stays on the device, does not sync.

        Args:
            steps: Shape (pairs,), int64, values in {-1, 0, +1}.
        """

    def observed(self) -> list[torch.Tensor]:
        """What was observed since the last step, as counts to sum over all ranks.

        Returns:
            Numbers, int64, as many on a rank that observed no pairs.
        """
        return []

    def advance(self, counts: Sequence[int]) -> None:
        """At the end of an optimizer step.

        Args:
            counts: The sums of `observed` over all ranks.
        """

    def discard(self) -> None:
        """Forgets what was observed: the optimizer skipped its step."""

    def reference_moved(self, share: float) -> None:
        """The reference took over a share of the policy, from 0 to 1 (TR-DPO)."""

    def reset(self) -> None:
        """Back to the start of a run."""
        self.beta = self.settings.beta

    def metrics(self) -> dict[str, float]:
        """What is logged of a step, before it advances."""
        return {"kl/beta": self.beta}

    def state_dict(self) -> dict[str, Any]:
        """State and settings, as plain JSON values."""
        return {"beta": self.beta, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes the state of a checkpoint; the settings stay the recipe's.

        Of another control's nothing is taken: β is β₀ again.

        Args:
            state: What `state_dict` returned.

        Returns:
            One line per setting in which checkpoint and recipe differ.
        """
        self.reset()
        state = {"control": "epsilon", **state}  # the only one there was
        if state["control"] == self.settings.control:
            self._load(state)
        return [
            f"{key} was {state.get(key)} in the checkpoint and is {value} now"
            for key, value in self._settings().items()
            if state.get(key) != value
        ]

    def _load(self, state: Mapping[str, Any]) -> None:
        """Nothing: β is the recipe's."""

    def _settings(self) -> dict[str, Any]:
        said = {key: getattr(self.settings, key) for key in ("control", *self._reads)}
        return {"initial_beta": self.settings.beta, **said}


class EpsilonController(BetaController):
    """β is the mean of the pairs' β̃ of the step before (Eq. 6)."""

    _reads = ("epsilon", "beta_mean")
    _counts: torch.Tensor | None

    def __init__(self, settings: ControllerSettings):
        super().__init__(settings)
        self.epsilon: float = settings.epsilon

    def pair_betas(self, steps: torch.Tensor) -> torch.Tensor:
        """As BetaController's: β / (1 + ε s) (Eq. 5)."""
        return loss.pair_betas(steps, self.beta, self.epsilon)

    def observe(self, steps: torch.Tensor) -> None:
        """As BetaController's: counts steps."""
        counts = torch.stack([(steps == s).sum() for s in (-1, 0, 1)])
        self._counts = counts if self._counts is None else self._counts + counts

    def observed(self) -> list[torch.Tensor]:
        """As BetaController's: pairs of each step."""
        counts = self._counts
        return [*(torch.zeros(3, dtype=torch.int64) if counts is None else counts)]

    def advance(self, counts: Sequence[int]) -> None:
        """As BetaController's: by the pairs of the step."""
        self.beta = loss.next_beta(
            self.beta, self.epsilon, counts, self.settings.beta_mean
        )
        self.discard()

    def discard(self) -> None:
        """As BetaController's."""
        self._counts = None

    def reset(self) -> None:
        """As BetaController's."""
        super().reset()
        self.discard()

    def _load(self, state: Mapping[str, Any]) -> None:
        self.beta = float(state["beta"])


class MarginController(BetaController):
    """β of a step by the margins of its own pairs; between steps, as in evaluation, β₀.

    A step's margins are in the averages that it is compared with, as in the authors'
    code, and the averages begin with those of the first step.

    Attributes:
        average: M₀, moving average of the mean margin, nats.
        deviation: σ, moving average of the margins' standard deviation, nats.
    """

    _reads = ("margin_weight", "margin_momentum", "margin_keep")
    average: float | None
    deviation: float | None
    _begun: tuple[float, float] | None

    @property
    def filters(self) -> bool:
        """Whether pairs may be left out."""
        return self.settings.margin_keep < 1

    @property
    def has_begun(self) -> bool:
        """Whether β of this step is known."""
        return self._begun is not None

    def begin(self, pairs: Sequence[tuple[float, float]]) -> list[bool]:
        """β of a step, before its losses.

        Args:
            pairs: Of all pairs of the step on all ranks, the margin (log π_θ - log
                π_ref of chosen minus that of rejected, nats, finite), and the Gumbel
                noise by which the filter draws.

        Returns:
            For each pair, whether it is trained on.
        """
        if not pairs:
            return []
        margins = [margin for margin, _ in pairs]
        spread = stdev(margins) if len(margins) > 1 else 0.0
        average = self._moved(self.average, _mean(margins))
        deviation = self._moved(self.deviation, spread)
        self._begun = average, deviation
        kept = self._draw(pairs, average, deviation)
        used = [m for m, is_kept in zip(margins, kept, strict=True) if is_kept]
        self.beta = loss.batch_beta(
            self.settings.beta, self.settings.margin_weight, _mean(used), average
        )
        return kept

    def _moved(self, average: float | None, value: float) -> float:
        if average is None:
            return value
        momentum = self.settings.margin_momentum
        return momentum * average + (1 - momentum) * value

    def _draw(self, pairs, average: float, deviation: float) -> list[bool]:
        """Without replacement, with weights exp(-(margin - M₀)²/2σ²).

        The largest sums of log-weight and Gumbel noise are such a draw; it depends on
        neither the order of the pairs nor the rank that has them.
        """
        if not self.filters:
            return [True] * len(pairs)
        count = max(int(len(pairs) * self.settings.margin_keep), 1)
        keys = [
            noise - ((margin - average) / deviation) ** 2 / 2 if deviation else noise
            for margin, noise in pairs
        ]
        best = {*sorted(range(len(keys)), key=lambda i: -keys[i])[:count]}
        return [i in best for i in range(len(keys))]

    def advance(self, counts: Sequence[int]) -> None:
        """As BetaController's: the averages of the step count from now on."""
        if self._begun is not None:
            self.average, self.deviation = self._begun
        self.discard()

    def discard(self) -> None:
        """As BetaController's."""
        self._begun = None
        self.beta = self.settings.beta

    def reference_moved(self, share: float) -> None:
        """As BetaController's: margins, from the new reference, are smaller.

        To 1 - share of what they were: exact for 1, and to first order for less.
        """
        if self.average is not None and self.deviation is not None:
            self.average *= 1 - share
            self.deviation *= 1 - share

    def reset(self) -> None:
        """As BetaController's."""
        self.average = self.deviation = None
        self.discard()

    def metrics(self) -> dict[str, float]:
        """As BetaController's, and M₀."""
        if self._begun is None:
            return super().metrics()
        return {**super().metrics(), "kl/margin_average": self._begun[0]}

    def state_dict(self) -> dict[str, Any]:
        """As BetaController's."""
        averages = {"average": self.average, "deviation": self.deviation}
        return {**super().state_dict(), **averages}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.average, self.deviation = state["average"], state["deviation"]


CONTROLLERS: dict[Control, type[BetaController]] = {
    "epsilon": EpsilonController,
    "fixed": BetaController,
    "batch_margin": MarginController,
}


def controller_of(settings: ControllerSettings) -> BetaController:
    """The controller that a recipe asks for."""
    return CONTROLLERS[settings.control](settings)


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
