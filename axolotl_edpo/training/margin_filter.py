"""`MarginFilter`: computes the margins of an optimizer step before its losses (β-DPO).

β-DPO compares the mean margin of a batch with a moving average, and may leave pairs out
by their margins (`MarginController`). Its authors' batch is a micro-batch. Ours is the
whole optimizer step on all ranks, so that the result does not depend on the number of
micro-batches. If a step has one micro-batch, its forward gives the margins. If it has
several, all of them first run once more, without gradient.
"""

import math
import random
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from ..background import on_device
from ..data.collator import Examples
from ..data.layout import Batch, release_masks
from ..data.pair_id import pair_digest
from ..distributed import gather_rows
from ..losses.beta_controller import MarginController
from ..losses.preference import PreferenceLoss
from ..models.completion_forward import without_gradient
from ..ops.token_stats import TokenStats
from .finite_checks import FiniteCheck
from .pair_outcomes import margins
from .scoring import PairScorer


class MarginFilter:
    """Passes the margins of each step to a `MarginController`, and keeps its weights.

    Args:
        controller: The run's controller of β.
        scorer: The run's scorer.
        loss: The run's loss, which defines the weight of each token.
        accelerator: The run's accelerator.
        finite: Stops the run if a margin is not finite.
        seed: Seed of the random choice of pairs.
    """

    def __init__(
        self,
        controller: MarginController,
        scorer: PairScorer,
        loss: PreferenceLoss,
        accelerator: Accelerator,
        finite: FiniteCheck,
        seed: int,
    ):
        self._controller, self._scorer, self._loss = controller, scorer, loss
        self._accelerator, self._finite, self._seed = accelerator, finite, seed
        self._weights: dict[Examples, torch.Tensor] = {}

    def look_ahead(
        self,
        policy: nn.Module,
        batches: Sequence[Batch],
        to_device: Callable[[Batch], Batch],
        steps_done: int,
    ) -> None:
        """Computes the margins of a step that has several micro-batches.

        Does nothing for a step of one micro-batch: `weights` handles it.

        Args:
            policy: The policy, wrapped by its engine.
            batches: This rank's micro-batches of the step.
            to_device: Moves a batch to the run's device.
            steps_done: Number of optimizer steps before this one.

        Raises:
            Diverged: If a margin is not finite.
        """
        if len(batches) == 1:
            return
        policy.train()  # as in the step itself; an evaluation may have come before
        every = [self._score(policy, to_device(batch)) for batch in batches]
        self._begin(batches, torch.cat(every), steps_done)
        self._scorer.reference.restart()  # the step runs the batches once more

    def weights(
        self, batch: Batch, stats: TokenStats, steps_done: int
    ) -> torch.Tensor | None:
        """The weight of each pair in the mean loss.

        Args:
            batch: A micro-batch of the step. If `look_ahead` did nothing, it is the
                only one of the step.
            stats: Statistics of the batch's tokens.
            steps_done: Number of optimizer steps before this one.

        Returns:
            Shape (pairs,), float32: 0 for pairs that are left out, with a mean of 1
            over the step. None if all pairs have weight 1.

        Raises:
            Diverged: If a margin is not finite.
        """
        if not self._controller.has_begun:
            found = margins(stats, batch["lengths"], self._loss)
            self._begin([batch], found, steps_done)
        return self._weights[batch["examples"]] if self._controller.filters else None

    def _score(self, policy: nn.Module, batch: Batch) -> torch.Tensor:
        """Margins of a batch's pairs, shape (pairs,), nats."""
        with without_gradient(self._accelerator.unwrap_model(policy)):
            stats, _ = self._scorer(policy, batch)
        release_masks(batch)
        return margins(stats, batch["lengths"], self._loss)

    def _begin(
        self, batches: Sequence[Batch], pair_margins: torch.Tensor, steps_done: int
    ) -> None:
        """Gives the controller the margins of all ranks, and stores weights of pairs.

        Args:
            batches: This rank's micro-batches of the step.
            pair_margins: Margins of this rank's pairs, shape (pairs,), nats.
            steps_done: Number of optimizer steps before this one.

        Raises:
            Diverged: On every rank, if a margin is not finite. In the first step
                policy and reference are compared instead, with the losses.
        """
        pairs = [pair for batch in batches for pair in batch["examples"].pairs]
        noise = torch.zeros(len(pairs), dtype=torch.float64)
        if self._controller.filters:
            seed = f"{self._seed} {steps_done}"
            draws = [gumbel(seed, pair) for pair in pairs]
            noise = torch.tensor(draws, dtype=torch.float64)
        columns = torch.stack([pair_margins.cpu().double(), noise], dim=1)
        rows, first = gather_rows(self._accelerator, columns)
        every_margin, every_noise = rows.cpu().unbind(dim=1)
        finite = every_margin.isfinite()
        broken = len(finite) - int(finite.sum())
        if broken and steps_done:
            what = f"the margin of {broken} of the step's pairs is"
            self._finite.stop(what, steps_done + 1, self._controller.beta)
        kept = self._controller.begin(every_margin.where(finite, 0.0), every_noise)
        self._weights = {}
        if self._controller.filters:
            weights = kept.float() * (len(kept) / max(int(kept.sum()), 1))
            local = on_device(weights[first : first + len(pairs)], pair_margins.device)
            self._share_out(batches, local)

    def _share_out(self, batches: Sequence[Batch], weights: torch.Tensor) -> None:
        """Stores the weights of this rank's pairs by batch."""
        examples = [batch["examples"] for batch in batches]
        parts = weights.split([len(one.pairs) for one in examples])
        self._weights = dict(zip(examples, parts, strict=True))


def gumbel(seed: str, pair: dict) -> float:
    """A draw of standard Gumbel noise, the same on whichever rank the pair is.

    Args:
        seed: Run and step.
        pair: Token columns of the pair.
    """
    uniform = random.Random(f"{seed} {pair_digest(pair).hex()}").random()
    return -math.log(-math.log(uniform or 0.5))
