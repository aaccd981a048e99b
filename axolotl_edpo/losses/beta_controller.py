"""The controllers of β: one for each `edpo_control`, all with the same methods.

    epsilon       ε-DPO: β is the mean of β̃ over the pairs of the previous step
    fixed         DPO: β is always β₀
    batch_margin  β-DPO: β of a step depends on how far the mean margin of its pairs is
                  from a moving average M₀ (Wu et al., https://arxiv.org/abs/2407.08639)

A controller has settings, which come from the recipe and never change. It has state: β
and the few numbers from which the next β is computed.

The trainer calls these methods in every optimizer step:

    begin                  once, `batch_margin` only
    pair_betas, observe    for each micro-batch
    advance                at the end, with the counts of all ranks
    discard                instead of `advance`, if the optimizer skipped its step

The state is bitwise the same on every rank, and does not depend on the order of the
pairs. Counts are integers, and a sum of margins is rounded only once, at its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import stdev
from typing import Any, Literal

import torch

from . import edpo
from .edpo import BetaMean

Control = Literal["epsilon", "fixed", "batch_margin"]


@dataclass(frozen=True)
class ControllerSettings:
    """The recipe's settings of β.

    Attributes:
        beta: β₀ > 0.
        epsilon: ε of the control `epsilon`, 0 < ε < 1.
        beta_mean: Kind of mean in Eq. 6, for the control `epsilon`.
        control: `edpo_control`.
        margin_weight: α of `batch_margin`, per nat, >= 0.
        margin_momentum: Momentum of the moving averages of `batch_margin`, >= 0, < 1.
        margin_keep: ρ of `batch_margin`: the share of a step's pairs that are trained
            on, > 0, <= 1.
    """

    beta: float
    epsilon: float = 0.01
    beta_mean: BetaMean = "arithmetic"
    control: Control = "epsilon"
    margin_weight: float = 0.6
    margin_momentum: float = 0.9
    margin_keep: float = 1.0

    @classmethod
    def from_config(cls, cfg: Any, beta: float) -> "ControllerSettings":
        """The settings of a recipe.

        Args:
            cfg: axolotl's config, validated.
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
    """The controller of `fixed`, and the base class of the others: β stays β₀.

    Args:
        settings: The recipe's settings.

    Attributes:
        settings: The recipe's settings.
        beta: β of the current step, > 0.
        epsilon: The perturbation ε of `token_stats`; None: no perturbed policies.
    """

    epsilon: float | None = None
    # Settings that a checkpoint holds, in addition to β₀ and the control.
    _saved_settings: tuple[str, ...] = ()

    def __init__(self, settings: ControllerSettings):
        self.settings = settings
        self.reset()

    def pair_betas(self, steps: torch.Tensor) -> torch.Tensor:
        """β̃ of each pair. In this class β̃ is β.

        Args:
            steps: Shape (pairs,), int64, values in {-1, 0, +1}.

        Returns:
            Shape (pairs,), float32, positive.
        """
        return torch.full_like(steps, self.beta, dtype=torch.float32)

    def observe(self, steps: torch.Tensor) -> None:
        """Records the steps of a micro-batch, without waiting for the GPU.

        Args:
            steps: Shape (pairs,), int64, values in {-1, 0, +1}.
        """

    def observed(self) -> list[torch.Tensor]:
        """What this rank recorded since the last `advance` or `discard`.

        The caller sums each count over all ranks.

        Returns:
            Scalars, int64. A controller always returns the same number of them.
        """
        return []

    def advance(self, counts: Sequence[int]) -> None:
        """Sets β for the next optimizer step.

        Args:
            counts: The counts of `observed`, summed over all ranks.
        """

    def discard(self) -> None:
        """Forgets the recorded counts: the optimizer skipped its step."""

    def reference_moved(self, share: float) -> None:
        """Adapts the state to a reference that moved towards the policy (TR-DPO).

        Args:
            share: Weight of the policy in the new reference, from 0 to 1.
        """

    def reset(self) -> None:
        """Returns to the state at the start of a run."""
        self.beta = self.settings.beta

    def metrics(self) -> dict[str, float]:
        """The values to log for this step, by name. Call it before `advance`."""
        return {"kl/beta": self.beta}

    def state_dict(self) -> dict[str, Any]:
        """β and the settings, as JSON values."""
        return {"beta": self.beta, **self._settings_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Loads the state of a checkpoint. The settings stay those of the recipe.

        If the checkpoint has another control, no state is loaded, and β is β₀.

        Args:
            state: What `state_dict` returned.

        Returns:
            One line for each setting that differs between checkpoint and recipe.
        """
        self.reset()
        # old checkpoints name no control: there was only `epsilon`
        state = {"control": "epsilon", **state}
        if state["control"] == self.settings.control:
            self._load(state)
        return [
            f"{key} was {state.get(key)} in the checkpoint and is {value} now"
            for key, value in self._settings_dict().items()
            if state.get(key) != value
        ]

    def _load(self, state: Mapping[str, Any]) -> None:
        """Loads nothing: β is always β₀."""

    def _settings_dict(self) -> dict[str, Any]:
        names = ("control", *self._saved_settings)
        settings = {name: getattr(self.settings, name) for name in names}
        return {"initial_beta": self.settings.beta, **settings}


class EpsilonController(BetaController):
    """ε-DPO: β is the mean of β̃ over the pairs of the previous step (Eq. 6)."""

    _saved_settings = ("epsilon", "beta_mean")
    _counts: torch.Tensor | None

    def __init__(self, settings: ControllerSettings):
        super().__init__(settings)
        self.epsilon: float = settings.epsilon

    def pair_betas(self, steps: torch.Tensor) -> torch.Tensor:
        """β̃ = β / (1 + ε s) (Eq. 5); shape (pairs,), float32."""
        return edpo.pair_betas(steps, self.beta, self.epsilon)

    def observe(self, steps: torch.Tensor) -> None:
        """Counts the values -1, 0 and +1 in `steps`: shape (pairs,), int64."""
        counts = torch.stack([(steps == s).sum() for s in (-1, 0, 1)])
        self._counts = counts if self._counts is None else self._counts + counts

    def observed(self) -> list[torch.Tensor]:
        """The numbers of pairs with step -1, 0 and +1."""
        counts = self._counts
        return [*(torch.zeros(3, dtype=torch.int64) if counts is None else counts)]

    def advance(self, counts: Sequence[int]) -> None:
        """Sets β to the mean of β̃, from the numbers of pairs with step -1, 0 and +1."""
        self.beta = edpo.next_beta(
            self.beta, self.epsilon, counts, self.settings.beta_mean
        )
        self.discard()

    def discard(self) -> None:
        """Forgets the counts."""
        self._counts = None

    def reset(self) -> None:
        """Sets β to β₀ and forgets the counts."""
        super().reset()
        self.discard()

    def _load(self, state: Mapping[str, Any]) -> None:
        self.beta = float(state["beta"])


@dataclass(frozen=True)
class MarginAverages:
    """The moving averages of β-DPO over the steps so far.

    Attributes:
        mean: M₀, of the mean margin of a step, nats.
        deviation: σ, of the standard deviation of a step's margins, nats.
    """

    mean: float
    deviation: float


class MarginController(BetaController):
    """β-DPO: β of a step is computed from the margins of the pairs of that step.

    Between steps β is β₀; evaluation uses this value. The margins of a step are first
    added to the moving averages and then compared with them, as in the authors' code.
    The first step sets the averages.

    Attributes:
        average: M₀, moving average of a step's mean margin, nats; None before the
            first step.
        deviation: σ, moving average of the standard deviation of a step's margins,
            nats; None before the first step.
    """

    _saved_settings = ("margin_weight", "margin_momentum", "margin_keep")
    average: float | None
    deviation: float | None
    # The averages that include the current step; None between steps.
    _begun: MarginAverages | None

    @property
    def filters(self) -> bool:
        """Whether a step trains on only a part of its pairs."""
        return self.settings.margin_keep < 1

    @property
    def has_begun(self) -> bool:
        """Whether `begin` has set β for the current step."""
        return self._begun is not None

    def begin(self, margins: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sets β of a step. Call it before the losses of the step.

        Without pairs it changes nothing.

        Args:
            margins: Shape (pairs,), float64, nats, finite: log π_θ - log π_ref of
                chosen minus that of rejected, for all pairs of the step on all ranks.
            noise: Shape (pairs,), float64: a Gumbel sample for each pair, for the
                random choice of pairs. Not used unless `filters`.

        Returns:
            Shape (pairs,), bool: which pairs are trained on.
        """
        if not len(margins):
            return torch.zeros_like(margins, dtype=torch.bool)
        averages = self._averages_with(margins.tolist())
        kept = self._draw(margins, noise, averages)
        mean = _mean(margins[kept].tolist())
        settings = self.settings
        self.beta = edpo.batch_beta(
            settings.beta, settings.margin_weight, mean, averages.mean
        )
        self._begun = averages
        return kept

    def _averages_with(self, margins: Sequence[float]) -> MarginAverages:
        """The moving averages, with the margins of this step added."""
        # stdev sums exactly, like fsum: the order of the pairs does not matter
        deviation = stdev(margins) if len(margins) > 1 else 0.0
        return MarginAverages(
            self._moved(self.average, _mean(margins)),
            self._moved(self.deviation, deviation),
        )

    def _moved(self, average: float | None, value: float) -> float:
        if average is None:
            return value
        momentum = self.settings.margin_momentum
        return momentum * average + (1 - momentum) * value

    def _draw(
        self, margins: torch.Tensor, noise: torch.Tensor, averages: MarginAverages
    ) -> torch.Tensor:
        """Draws pairs without replacement, with weights exp(-(margin - M₀)²/2σ²).

        It takes the pairs with the largest sums of log-weight and Gumbel noise (the
        Gumbel-top-k trick). So every rank draws the same pairs, in whatever order.

        Returns:
            Shape (pairs,), bool.
        """
        if not self.filters:
            return torch.ones_like(margins, dtype=torch.bool)
        keys = noise
        if averages.deviation:
            scores = (margins - averages.mean) / averages.deviation
            keys = noise - scores.square() / 2
        count = max(int(len(keys) * self.settings.margin_keep), 1)
        kept = torch.zeros_like(keys, dtype=torch.bool)
        # among equal keys, a stable sort chooses alike on every rank; topk may not
        kept[keys.argsort(descending=True, stable=True)[:count]] = True
        return kept

    def advance(self, counts: Sequence[int]) -> None:
        """Keeps the averages that include this step, and sets β to β₀."""
        if self._begun is not None:
            self.average, self.deviation = self._begun.mean, self._begun.deviation
        self.discard()

    def discard(self) -> None:
        """Forgets the averages that include this step, and sets β to β₀."""
        self._begun = None
        self.beta = self.settings.beta

    def reference_moved(self, share: float) -> None:
        """Multiplies both averages with 1 - share.

        Margins shrink by this factor when the reference moves towards the policy. The
        factor is exact for a share of 1, else a first-order approximation.
        """
        if self.average is not None and self.deviation is not None:
            self.average *= 1 - share
            self.deviation *= 1 - share

    def reset(self) -> None:
        """Forgets the averages, and sets β to β₀."""
        self.average = self.deviation = None
        self.discard()

    def metrics(self) -> dict[str, float]:
        """`kl/beta`, and within a step M₀ as `kl/margin_average`."""
        if self._begun is None:
            return super().metrics()
        return {**super().metrics(), "kl/margin_average": self._begun.mean}

    def state_dict(self) -> dict[str, Any]:
        """β, both averages and the settings, as JSON values."""
        averages = {"average": self.average, "deviation": self.deviation}
        return {**super().state_dict(), **averages}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.average, self.deviation = state["average"], state["deviation"]


CONTROLLERS: dict[Control, type[BetaController]] = {
    "epsilon": EpsilonController,
    "fixed": BetaController,
    "batch_margin": MarginController,
}


def make_controller(settings: ControllerSettings) -> BetaController:
    """A controller for `settings.control`, with the state of a new run."""
    return CONTROLLERS[settings.control](settings)


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
