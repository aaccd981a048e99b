"""Means of what is logged, accumulated on the device.

A mean must not depend on how pairs are divided into micro-batches: a micro-batch of
four pairs weighs four times as much as one of one pair. So sums are kept on the device,
and weights on the CPU. Once per log, both are summed over ranks and divided.
"""

from collections.abc import Callable
from typing import Literal

import torch

from ..background import on_device
from ..data.completions import sum_per_sequence
from ..data.layout import Batch
from ..ops.token_stats import TokenStats
from ..reference.kept import KL
from .pair_outcomes import AnswerStats, MeanOverStep, PairOutcomes
from .set_metrics import SetMetrics

Mode = Literal["train", "eval"]


class WeightedMeans:
    """Accumulates named values, and computes their means over all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, int] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds values of equal weight, one per pair or per token.

        Args:
            name: Name of the logged mean.
            values: Shape (n,); n may be 0.
        """
        total = values.detach().float().sum()
        before = self._sums.get(name)
        self._sums[name] = total if before is None else before + total
        self._weights[name] = self._weights.get(name, 0) + values.numel()

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Returns the means over all values since the last call, and resets them.

        Args:
            reduce: Sums a tensor of shape (names, 2) over all ranks.

        Returns:
            Name -> mean; 0.0 if the name has no values.
        """
        if not self._sums:
            return {}
        names, sums = list(self._sums), torch.stack([*self._sums.values()])
        weights = torch.tensor([*self._weights.values()], dtype=sums.dtype)
        columns = torch.stack([sums, on_device(weights, sums.device)], dim=1)
        totals = reduce(columns).tolist()
        self._sums.clear()
        self._weights.clear()
        return {
            name: total / weight if weight else 0.0
            for name, (total, weight) in zip(names, totals, strict=True)
        }


class PairMetrics:
    """Accumulates the metrics of pairs, apart for training and evaluation.

    Args:
        perturbed: Whether ε-DPO computes a step s for each pair.
        mean: Makes the loss of an evaluation of its means.
        sets: Names of the sets that are evaluated; empty if there is one.
    """

    def __init__(self, perturbed: bool, mean: MeanOverStep, sets: tuple[str, ...] = ()):
        self._perturbed, self._mean = perturbed, mean
        self._sets = SetMetrics(sets, perturbed, mean)
        self._means: dict[Mode, WeightedMeans] = {
            "train": WeightedMeans(),
            "eval": WeightedMeans(),
        }
        self._by_step: dict[str, list[float]] = {}
        self._tokens = 0
        self._new_tokens: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens trained on so far, on all ranks; waits for the device."""
        if self._new_tokens is not None:
            self._tokens += int(self._new_tokens)
            self._new_tokens = None
        return self._tokens

    @tokens.setter
    def tokens(self, count: int) -> None:
        self._tokens, self._new_tokens = count, None

    def add_tokens(self, count: torch.Tensor) -> None:
        """Adds a number of tokens, shape (), int64; does not wait for the device."""
        before = self._new_tokens
        self._new_tokens = count if before is None else before + count

    def add_step(self, values: dict[str, float]) -> None:
        """Adds numbers of an optimizer step; the mean over steps is logged."""
        for name, value in values.items():
            self._by_step.setdefault(name, []).append(value)

    def add(
        self,
        mode: Mode,
        batch: Batch,
        stats: TokenStats,
        pairs: PairOutcomes,
        router_loss: torch.Tensor | None,
    ) -> None:
        """Adds a micro-batch; does not wait for the device.

        Args:
            mode: Training or evaluation.
            batch: The micro-batch.
            stats: Statistics of its scored tokens.
            pairs: Outcomes of its pairs.
            router_loss: Router loss of a mixture of experts, shape (); or None.
        """
        add = self._means[mode].add
        if self._perturbed:
            add("kl/avg_steps", pairs.steps)
            add("kl/p_epsilon_steps", pairs.steps == 1)
            add("kl/n_epsilon_steps", pairs.steps == -1)
        add("rewards/chosen", pairs.chosen_rewards)
        add("rewards/rejected", pairs.rejected_rewards)
        add("rewards/accuracies", pairs.margins > 0)
        add("rewards/margins", pairs.margins)
        logps = sum_per_sequence(stats.policy_logp.detach(), batch["lengths"])
        for name, values in zip(("chosen", "rejected"), logps.chunk(2), strict=True):
            add(f"logps/{name}", values)
        chosen = batch["chosen_tokens"]
        if not isinstance(stats, AnswerStats):
            add(KL, stats.kl)
        add("entropy", stats.entropy)
        add("mean_token_accuracy", stats.is_top1[:chosen])
        add("logits/chosen", stats.mean_logit[:chosen])
        add("logits/rejected", stats.mean_logit[chosen:])
        if router_loss is not None:
            add("aux_loss", router_loss.expand(len(pairs.steps)))
        if mode == "eval":
            add("loss/pairs", pairs.losses)
            add("loss/sft", -stats.policy_logp[:chosen])
            self._sets.add(add, batch, stats, pairs, router_loss)

    def pop(
        self,
        mode: Mode,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        beta: float,
    ) -> dict[str, list[float]]:
        """Returns the metrics to log, and resets them.

        Args:
            mode: Training or evaluation.
            reduce: Sums a tensor over all ranks.
            beta: The current β, logged by evaluations.

        Returns:
            Name -> numbers, whose mean TRL logs.
        """
        values: dict[str, list[float]] = {}
        if mode == "train":
            values, self._by_step = self._by_step, {}
        means = self._means[mode].pop(reduce)
        if means:
            means["num_tokens"] = self.tokens
            if mode == "eval":
                means |= {"kl/beta": beta, "loss": self._loss_of(means)}
                self._sets.finish(means)
            values |= {name: [value] for name, value in means.items()}
        return values

    def _loss_of(self, means: dict[str, float]) -> float:
        """Takes the parts of an evaluation's loss out of the means.

        transformers averages the losses of micro-batches, as if all had the same number
        of pairs and of tokens. This value replaces its `eval_loss`.
        """
        aux_loss = means.get("aux_loss", 0.0)
        losses, sft = means.pop("loss/pairs"), means.pop("loss/sft")
        return self._mean.of_whole_set(losses, sft, aux_loss)
