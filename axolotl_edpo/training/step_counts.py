"""`StepCounts`: counts over the pairs of an optimizer step, summed over ranks."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from ..distributed import count_over_ranks
from ..losses.beta_controller import BetaController
from .finite_checks import FiniteCheck


class StepCounts:
    """Counts on the device; once per optimizer step, sums over ranks and waits for it.

    Args:
        accelerator: The run's accelerator.
        controller: Counts the steps s of pairs.
        finite: Counts losses that are not finite.

    Attributes:
        finite: The argument.
        totals: The controller's counts of the last optimizer step, over all ranks.
    """

    def __init__(
        self, accelerator: Accelerator, controller: BetaController, finite: FiniteCheck
    ):
        self._accelerator = accelerator
        self._controller, self.finite = controller, finite
        self.totals: Sequence[int] = ()

    def observe(self, steps: torch.Tensor, losses: torch.Tensor, step: int) -> None:
        """Counts the pairs of a micro-batch.

        Args:
            steps: Steps s, shape (pairs,), int64, values in {-1, 0, +1}.
            losses: Shape (pairs,).
            step: The optimizer step, counted from 1.

        Raises:
            Diverged: At the last micro-batch of a step in which a loss is not finite.
        """
        self._controller.observe(steps)
        self.finite.observe(losses)
        if self._accelerator.sync_gradients:
            self._sum(step)

    def _sum(self, step: int) -> None:
        counts = torch.stack([self.finite.take(), *self._controller.observed()])
        broken, *self.totals = count_over_ranks(self._accelerator, counts).tolist()
        if broken:
            what = f"the loss of {broken} of the step's pairs is"
            self.finite.stop(what, step, self._controller.beta)
