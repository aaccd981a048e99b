"""The equations of ε-DPO as pure functions on per-pair tensors.

    step      s  in {-1, 0, +1}: would a smaller (+1) or a larger (-1) KL penalty
              separate chosen from rejected better?                          (Eq. 5)
    beta      β̃ = β / (1 + ε s)                                             (Eq. 5)
    loss      -log σ(β̃ · log_ratio)
    update    β ← mean of β̃ over the pairs of one optimizer step            (Eq. 6)

Equations: Lee et al., "KL Penalty Control via Perturbation for Direct Preference
Optimization", https://arxiv.org/abs/2502.13177. Nothing here knows a trainer, and
nothing reduces over pairs but `next_beta`, whose subject is the reduction. The one
equation of another paper is `batch_beta`, of β-DPO.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

BetaMean = Literal["arithmetic", "harmonic"]
# Below this, β-DPO's β does not fall: the value of its authors' code.
LOWEST_BATCH_BETA = 1e-3


def steps(delta_plus: torch.Tensor, delta_minus: torch.Tensor) -> torch.Tensor:
    """Direction in which each pair's KL penalty moves (Eq. 5).

    With z_λ the log-probability of chosen minus that of rejected under the policy
    for β/λ, delta_plus = z_{1+ε} - z_1 and delta_minus = z_{1-ε} - z_1. The
    inequalities are strict: a difference of exactly 0 moves nothing.

    Args:
        delta_plus: Shape (pairs,), nats.
        delta_minus: Shape (pairs,), nats.

    Returns:
        Shape (pairs,), int64: +1 where z_{1+ε} > z_1 > z_{1-ε}, -1 where the order
        is reversed, else 0.
    """
    up = (delta_plus > 0) & (delta_minus < 0)
    down = (delta_plus < 0) & (delta_minus > 0)
    return up.long() - down.long()


def pair_betas(steps: torch.Tensor, beta: float, epsilon: float) -> torch.Tensor:
    """KL penalty of each pair, β̃ = β / (1 + ε s) (Eq. 5).

    Args:
        steps: Shape (pairs,), values in {-1, 0, +1}.
        beta: Current β > 0.
        epsilon: Perturbation, 0 < ε < 1.

    Returns:
        Shape (pairs,), float32, positive.
    """
    return beta / (1 + epsilon * steps.float())


def preference_loss(
    log_ratios: torch.Tensor, betas: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """DPO loss of each pair with a β of its own, -log σ(β̃ · log_ratio).

    With label smoothing α it is the conservative DPO loss: the expectation over a
    label that is flipped with probability α.

    Args:
        log_ratios: Shape (pairs,), nats: (log π_θ - log π_ref) of chosen minus that
            of rejected. Gradient flows here only.
        betas: Shape (pairs,), no gradient.
        label_smoothing: α, 0 <= α < 0.5.

    Returns:
        Shape (pairs,), nats.
    """
    logits = betas.detach() * log_ratios
    loss = -(1 - label_smoothing) * F.logsigmoid(logits)
    # log(1 - σ(x)) = log σ(-x), the latter without cancellation
    return loss - label_smoothing * F.logsigmoid(-logits)


def next_beta(
    beta: float, epsilon: float, counts: Sequence[int], mean: BetaMean
) -> float:
    """β after an optimizer step: the mean of its pairs' β̃ (Eq. 6).

    β̃ takes three values only, so the three counts determine its mean. Counting in
    integers makes the result independent, to the last bit, of how the step's pairs
    were cut into micro-batches and ranks.

    Args:
        beta: β that the step used.
        epsilon: Perturbation, 0 < ε < 1.
        counts: Number of pairs with step -1, 0 and +1.
        mean: `arithmetic` is Eq. 6. `harmonic` is β / (1 + ε · mean step), which the
            authors' released code computes.

    Returns:
        The new β, positive. Without pairs it stays as it is.
    """
    down, stay, up = counts
    total = down + stay + up
    if total == 0:
        return beta
    if mean == "harmonic":
        return beta / (1 + epsilon * (up - down) / total)
    return beta * (up / (1 + epsilon) + down / (1 - epsilon) + stay) / total


def batch_beta(beta: float, weight: float, mean_margin: float, average: float) -> float:
    """β of a batch in β-DPO, β₀ [1 + α (mean margin - M₀)], but not below a floor.

    Wu et al., "β-DPO: Direct Preference Optimization with Dynamic β",
    https://arxiv.org/abs/2407.08639. In the paper margins are rewards, β₀ times these;
    here they are in nats, as in the authors' code.

    Args:
        beta: β₀ > 0.
        weight: α >= 0, per nat.
        mean_margin: Of the batch: log π_θ - log π_ref of chosen minus that of
            rejected, nats.
        average: M₀, its moving average, nats.

    Returns:
        β, at least LOWEST_BATCH_BETA.
    """
    return max(beta * (1 + weight * (mean_margin - average)), LOWEST_BATCH_BETA)
