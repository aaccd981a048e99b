"""`PairMargins`: the margins of a step's pairs, before their losses.

β-DPO compares the mean margin of a batch with its moving average, and may leave pairs
out by their margins (`controller.py`). For its authors a batch is a micro-batch; here
it is the optimizer step on all ranks, so that nothing depends on how a step is cut. A
step of one micro-batch has its margins when it needs them; the micro-batches of others
run once more, without gradient, before the first.
"""

import math
import random
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from ..background import on_device
from ..data.packing import (
    Completions,
    chosen_minus_rejected,
    completions_of,
    sum_per_sequence,
)
from ..losses.beta_controller import MarginController
from ..losses.preference import LossSettings
from ..ops.token_stats import TokenStats
from ..reference.precompute import pair_digest
from .batching import forget_masks
from .callbacks import PairRun

KEPT = "kept"


class PairMargins(PairRun):
    """The trainer's look at a step before it is taken."""

    loss: LossSettings
    _score: Any  # the walk's
    _weight = 1.0

    def _ahead(self, model: nn.Module, batches: list[dict[str, Any]]) -> None:
        """As PairReference's; then the margins of a step of several micro-batches."""
        super()._ahead(model, batches)
        if self._margin_controller() is None or len(batches) == 1:
            return
        margins = []
        for batch in map(self._prepare_inputs, batches):
            completions = completions_of(batch)
            with self.compute_loss_context_manager(), self._without_gradient():
                stats, _ = self._score(model, batch, completions)
            margins.append(margins_of(stats, completions, self.loss))
            forget_masks(batch)
        self._begin(batches, torch.cat(margins))
        if reading := batches[0].get("reading"):
            reading.start()  # once more

    def _margin_controller(self) -> MarginController | None:
        """The one whose steps have to begin, if this run has one and trains."""
        if self.model.training and isinstance(self.controller, MarginController):
            return self.controller
        return None

    def _weights(
        self, batch: dict[str, Any], stats: TokenStats, completions: Completions
    ) -> torch.Tensor | None:
        """How much each pair of a batch counts, where some are left out.

        Returns:
            Shape (pairs,), float32, with a mean of 1 over the step.
        """
        controller = self._margin_controller()
        if controller and not controller.has_begun:
            self._begin([batch], margins_of(stats, completions, self.loss))
        return batch[KEPT] * self._weight if KEPT in batch else None

    def _begin(self, batches: list[dict[str, Any]], margins: torch.Tensor) -> None:
        """Begins a step; where the controller filters, batches learn what is kept.

        As truth values: DeepSpeed rounds numbers in a batch to its dtype.

        Args:
            batches: All of this rank.
            margins: Of their pairs, shape (pairs,), nats.

        Raises:
            Diverged: If a margin is not finite, on every rank.
        """
        controller: Any = self.controller
        pairs = [batch["examples"].pairs for batch in batches]
        seed = f"{self.args.seed} {self.state.global_step}"
        draw = partial(gumbel, seed) if controller.filters else lambda pair: 0.0
        own = [*zip(margins.tolist(), map(draw, chain(*pairs)), strict=True)]
        ranks = gather_object([own])
        step = [*chain(*ranks)]
        if broken := sum(not math.isfinite(margin) for margin, _ in step):
            self._stop(f"the margin of {broken} of the step's pairs is")
        kept = controller.begin(step)
        if not controller.filters:
            return
        self._weight = len(kept) / max(sum(kept), 1)
        first = sum(map(len, ranks[: self.accelerator.process_index]))
        mine = torch.tensor(kept[first : first + len(own)], dtype=torch.bool)
        parts = on_device(mine, margins.device).split([*map(len, pairs)])
        for batch, part in zip(batches, parts, strict=True):
            batch[KEPT] = part


def margins_of(
    stats: TokenStats, completions: Completions, loss: LossSettings
) -> torch.Tensor:
    """log π_θ - log π_ref of chosen minus that of rejected; shape (pairs,), nats."""
    log_ratios = (stats.policy_logp - stats.reference_logp).detach()
    counted = loss.counted(log_ratios, completions.lengths)
    return chosen_minus_rejected(sum_per_sequence(counted, completions.lengths))


def gumbel(seed: str, pair: dict[str, Any]) -> float:
    """A draw that belongs to a pair, whichever rank has it."""
    uniform = random.Random(f"{seed} {pair_digest(pair).hex()}").random()
    return -math.log(-math.log(uniform or 0.5))
