"""β as trainer state: observe every pair's step, advance once per optimizer step.

    settings  β₀, ε and the kind of mean: what the recipe says, never changes
    state     β, and how many pairs moved -1, 0, +1 since the last advance

The state is tiny and explicit, like a learning-rate plateau controller's. Counts are
integers, so every cut of a step into micro-batches, and every rank that sums the same
counts, arrives at the same β to the last bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .loss import BetaMean, next_beta


@dataclass(frozen=True)
class ControllerSettings:
    """What the recipe says: β₀ > 0, 0 < ε < 1 and the mean of Eq. 6."""

    beta: float
    epsilon: float = 0.01
    beta_mean: BetaMean = "arithmetic"


class BetaController:
    """Holds β; nothing else does.

    Args:
        settings: Initial β, ε and the kind of mean.
    """

    def __init__(self, settings: ControllerSettings):
        self.settings = settings
        self.beta = settings.beta
        self._counts: torch.Tensor | None = None

    def observe(self, steps: torch.Tensor) -> None:
        """Counts the steps of one micro-batch; stays on the device, does not sync.

        Args:
            steps: Shape (pairs,), int64, values in {-1, 0, +1}.
        """
        counts = torch.stack([(steps == s).sum() for s in (-1, 0, 1)])
        self._counts = counts if self._counts is None else self._counts + counts

    def advance(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Moves β by the pairs observed since the last call (Eq. 6).

        Args:
            reduce: Sums an int64 tensor of shape (3,) over all ranks. Every rank
                calls it, whether it observed pairs or not.
        """
        counts = self._counts
        if counts is None:
            counts = torch.zeros(3, dtype=torch.int64)
        totals = reduce(counts).tolist()
        self.beta = next_beta(
            self.beta, self.settings.epsilon, totals, self.settings.beta_mean
        )
        self.discard()

    def discard(self) -> None:
        """Forgets what was observed: the optimizer skipped its step."""
        self._counts = None

    def reset(self) -> None:
        """Back to the start of a run."""
        self.beta = self.settings.beta
        self.discard()

    def state_dict(self) -> dict[str, float | str]:
        """β and the settings it came from, as plain JSON values."""
        return {
            "beta": self.beta,
            "initial_beta": self.settings.beta,
            "epsilon": self.settings.epsilon,
            "beta_mean": self.settings.beta_mean,
        }

    def load_state_dict(self, state: Mapping[str, float | str]) -> list[str]:
        """Takes β from a checkpoint; the settings stay the recipe's.

        Args:
            state: What `state_dict` returned.

        Returns:
            One line per setting in which checkpoint and recipe differ.
        """
        self.discard()
        self.beta = float(state["beta"])
        return [
            f"{key} was {state.get(key)} in the checkpoint and is {value} now"
            for key, value in self.state_dict().items()
            if key != "beta" and state.get(key) != value
        ]
