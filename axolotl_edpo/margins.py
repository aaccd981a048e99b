"""`PairMargins`: the margins of a step's pairs, before their losses.

β-DPO compares the mean margin of a batch with its moving average, and may leave pairs
out by their margins (`controller.py`). For its authors a batch is a micro-batch; here
it is the optimizer step on all ranks, so that nothing depends on how a step is cut. A
step of one micro-batch has its margins when it needs them; the micro-batches of others
run once more, without gradient, before the first.
"""

import math
import random
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from .batch import (
    Completions,
    chosen_minus_rejected,
    completions_of,
    sum_per_sequence,
)
from .controller import MarginController
from .logprobs import TokenStats
from .precompute import pair_digest
from .run import PairRun

WEIGHTS = "weights"


class PairMargins(PairRun):
    """The trainer's look at a step before it is taken."""

    def _score(
        self, model: nn.Module, inputs, completions: Completions
    ) -> tuple[TokenStats, torch.Tensor | None]:
        """What the head says of a batch: the walk's."""
        raise NotImplementedError

    def _ahead(self, model: nn.Module, batches: list[dict[str, Any]]) -> None:
        """As PairReference's; then the margins of a step of several micro-batches."""
        super()._ahead(model, batches)
        if not self._follows_margins() or len(batches) == 1:
            return
        margins = []
        for batch in map(self._prepare_inputs, batches):
            completions = completions_of(batch)
            with self.compute_loss_context_manager(), self._without_gradient():
                stats, _ = self._score(model, batch, completions)
            margins.append(margins_of(stats, completions))
        self._weigh(batches, torch.cat(margins))

    def _follows_margins(self) -> bool:
        return self.model.training and isinstance(self.controller, MarginController)

    def _weights(
        self, batch: dict[str, Any], stats: TokenStats, completions: Completions
    ) -> torch.Tensor | None:
        """How much each pair of a batch counts, by its margin; None: all the same.

        Returns:
            Shape (pairs,), with a mean of 1 over the step.
        """
        if self._follows_margins() and WEIGHTS not in batch:
            self._weigh([batch], margins_of(stats, completions))
        return batch.get(WEIGHTS)

    def _weigh(self, batches: list[dict[str, Any]], margins: torch.Tensor) -> None:
        """Begins a step; each of its batches learns how much its pairs count.

        Args:
            batches: All of this rank.
            margins: Of their pairs, shape (pairs,), nats.
        """
        assert isinstance(self.controller, MarginController)
        pairs = [batch["examples"].pairs for batch in batches]
        seed = f"{self.args.seed} {self.state.global_step}"
        noise = [gumbel(seed, pair) for pair in chain(*pairs)]
        own = [*zip(margins.tolist(), noise, strict=True)]
        ranks = gather_object([own])
        kept = self.controller.begin([*chain(*ranks)])
        first = sum(map(len, ranks[: self.accelerator.process_index]))
        weights = margins.new_tensor(kept[first : first + len(own)])
        weights *= len(kept) / max(sum(kept), 1)
        parts = weights.split([*map(len, pairs)])
        for batch, part in zip(batches, parts, strict=True):
            batch[WEIGHTS] = part


def margins_of(stats: TokenStats, completions: Completions) -> torch.Tensor:
    """log π_θ - log π_ref of chosen minus that of rejected; shape (pairs,), nats."""
    log_ratios = (stats.policy_logp - stats.reference_logp).detach()
    return chosen_minus_rejected(sum_per_sequence(log_ratios, completions.lengths))


def gumbel(seed: str, pair: dict[str, Any]) -> float:
    """A draw that belongs to a pair, whichever rank has it."""
    uniform = random.Random(f"{seed} {pair_digest(pair).hex()}").random()
    return -math.log(-math.log(uniform or 0.5))
