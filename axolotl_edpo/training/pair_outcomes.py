"""`pair_outcomes`: step s, β̃, loss and rewards of each pair of a batch.

    token statistics → sums per answer → Δ±, s (Eq. 5) → β̃ (Eq. 5) → loss per pair

Pure functions. Equations: arXiv 2502.13177.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..data.completions import chosen_minus_rejected, sum_per_sequence
from ..data.layout import Batch
from ..losses import edpo
from ..losses.beta_controller import BetaController
from ..losses.preference import Answers, PreferenceLoss, wpo_weights
from ..ops.token_stats import TokenStats
from ..reference.kept import answer_logps


class AnswerStats(TokenStats):
    """The statistics of a policy whose reference is known by its answers only.

    `reference_logp` and `kl` are NaN.

    Attributes:
        reference_answers: Shape (2 x pairs,), nats, float64: log π_ref of all chosen,
            then of all rejected answers, see `reference.kept.answer_logps`.
    """

    reference_answers: torch.Tensor

    @classmethod
    def of(cls, stats: TokenStats, reference_answers: torch.Tensor) -> "AnswerStats":
        """Joins the statistics of the policy's tokens and the reference's answers."""
        joined = cls(*stats)
        joined.reference_answers = reference_answers
        return joined


class PairOutcomes(NamedTuple):
    """The outcomes of a batch's pairs.

    Each tensor except `log_ratios` has shape (pairs,).

    Attributes:
        plus: Δ+, nats.
        minus: Δ-, nats.
        steps: s of Eq. 5, in {-1, 0, +1}.
        betas: β̃ = β / (1 + ε s).
        losses: Preference loss without `sft` and NLL, with gradient.
        sft: -log π_θ of the chosen answer, nats, with gradient.
        chosen_rewards: Reward of the chosen answer, see `PreferenceLoss.rewards`.
        rejected_rewards: Reward of the rejected answer.
        log_ratios: Shape (2 x pairs,), nats: log π_θ - log π_ref of all chosen, then of
            all rejected answers; without a reference log π_θ. No gradient.
    """

    plus: torch.Tensor
    minus: torch.Tensor
    steps: torch.Tensor
    betas: torch.Tensor
    losses: torch.Tensor
    sft: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    log_ratios: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """Implicit reward margins: chosen minus rejected reward."""
        return self.chosen_rewards - self.rejected_rewards


def pair_outcomes(
    stats: TokenStats,
    lengths: torch.Tensor,
    controller: BetaController,
    loss: PreferenceLoss,
    weights: torch.Tensor | None = None,
) -> PairOutcomes:
    """Computes steps s and β̃ (Eq. 5), losses and rewards of a batch's pairs.

    Args:
        stats: Statistics of the scored tokens: all chosen, then all rejected answers.
        lengths: Shape (2 x pairs,), scored tokens of each answer.
        controller: Holds β.
        loss: The recipe's preference loss.
        weights: Shape (pairs,), factors of the losses; None: all 1.
    """

    def per_answer(values: torch.Tensor) -> torch.Tensor:
        return sum_per_sequence(loss.token_weighted(values, lengths), lengths)

    plus = chosen_minus_rejected(per_answer(stats.plus))
    minus = chosen_minus_rejected(per_answer(stats.minus))
    steps = edpo.steps(plus, minus)
    betas = controller.pair_betas(steps)
    log_ratios = answer_ratios(stats, lengths, loss)
    answers = Answers.from_sequences(log_ratios, lengths, betas)
    losses = loss.losses(answers)
    if loss.weighted:
        losses = losses * wpo_weights(_relative_logps(stats, lengths))
    if weights is not None:
        losses = losses * weights
    sft = -sum_per_sequence(stats.policy_logp, lengths).chunk(2)[0]
    kept = *loss.rewards(answers), log_ratios.detach()
    return PairOutcomes(plus, minus, steps, betas, losses, sft, *kept)


def answer_ratios(
    stats: TokenStats, lengths: torch.Tensor, loss: PreferenceLoss
) -> torch.Tensor:
    """log π_θ - log π_ref of each answer.

    Args:
        stats: Statistics of the scored tokens.
        lengths: Shape (2 x pairs,), scored tokens of each answer.
        loss: Defines the weight of each token.

    Returns:
        Shape (2 x pairs,), nats, float32, with gradient.
    """
    if isinstance(stats, AnswerStats):
        policy = answer_logps(stats.policy_logp, lengths, loss)
        return (policy - stats.reference_answers).float()
    # subtract before summing: float32 sums near -1000 are too coarse to subtract
    ratios = stats.policy_logp - stats.reference_logp
    return sum_per_sequence(loss.token_weighted(ratios, lengths), lengths)


def _relative_logps(stats: TokenStats, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of log p(y) - log Σ p² per answer, shape (2 x pairs,); see `wpo_weights`."""
    relative = stats.policy_logp - stats.sum_sq_probs.log()
    return sum_per_sequence(relative, lengths) / lengths.clamp(min=1)


def margins(
    stats: TokenStats, lengths: torch.Tensor, loss: PreferenceLoss
) -> torch.Tensor:
    """Margins before the factor β: the difference of the answers' log-ratios.

    Args:
        stats: Statistics of the scored tokens.
        lengths: Shape (2 x pairs,), scored tokens of each answer.
        loss: Defines the weight of each token.

    Returns:
        Shape (pairs,), nats, without gradient: log π_θ - log π_ref of the chosen
        answer, minus the same of the rejected answer.
    """
    return chosen_minus_rejected(answer_ratios(stats, lengths, loss).detach())


@dataclass(frozen=True)
class MeanOverStep:
    """Computes a micro-batch's share of the mean loss of an optimizer step.

    Attributes:
        ranks: Number of ranks over which the engine averages gradients.
        sft_weight: Weight of the mean of -log π_θ over chosen tokens; 0 if the loss
            has no such term.
        router_weight: Weight of the router loss of a mixture of experts.
    """

    ranks: int = 1
    sft_weight: float = 0.0
    router_weight: float = 0.0

    def __call__(
        self,
        pairs: PairOutcomes,
        batch: Batch,
        counts: torch.Tensor | None,
        router_loss: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sums the losses of a micro-batch, divided by the counts of the step.

        Args:
            pairs: Outcomes of its pairs.
            batch: The micro-batch.
            counts: Shape (2,), both above 0: pairs of the step and tokens of their
                chosen answers, on all ranks. None in evaluation: the loss is then the
                mean over this micro-batch, of which nothing is logged.
            router_loss: The micro-batch's router loss, shape (); or None.

        Returns:
            Shape (), with gradient.
        """
        size: Any = len(pairs.steps)
        if counts is None:
            whole_pairs, whole_tokens = max(size, 1), max(batch["chosen_tokens"], 1)
        else:
            whole_pairs, whole_tokens = counts / self.ranks
        loss = pairs.losses.sum() / whole_pairs
        if self.sft_weight:
            loss = loss + self.sft_weight * pairs.sft.sum() / whole_tokens
        if router_loss is not None:
            loss = loss + self.router_weight * (size / whole_pairs) * router_loss
        return loss

    def of_whole_set(self, losses: float, sft: float, router_loss: float) -> float:
        """The loss of an evaluation: that of one step with all pairs of the set.

        Args:
            losses: Mean over pairs of their losses.
            sft: Mean over the tokens of chosen answers of -log π_θ.
            router_loss: Mean over pairs of the router loss of their micro-batch.
        """
        return losses + self.sft_weight * sft + self.router_weight * router_loss


def traced_values(
    pairs: PairOutcomes, stats: TokenStats, lengths: torch.Tensor
) -> list[torch.Tensor]:
    """The columns of a trace, in the order of `pair_trace.VALUES`.

    Args:
        pairs: Outcomes of a micro-batch's pairs.
        stats: Statistics of its scored tokens.
        lengths: Shape (2 x pairs,), scored tokens of each answer.

    Returns:
        Tensors of shape (pairs,); `kl` is NaN for `AnswerStats`.
    """
    kl = torch.stack(sum_per_sequence(stats.kl, lengths).chunk(2)).sum(dim=0)
    chosen, rejected = lengths.chunk(2)
    kl = kl / (chosen + rejected).clamp(min=1)
    moved = [pairs.plus, pairs.minus, pairs.steps, pairs.betas, pairs.margins]
    return [*moved, kl, chosen, rejected]
