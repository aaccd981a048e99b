"""The equations of ε-DPO as pure functions on per-pair tensors.

    step      s in {-1, 0, +1}: +1 if a smaller KL penalty separates chosen from
              rejected better, -1 if a larger one does                       (Eq. 5)
    beta      β̃ = β / (1 + ε s)                                             (Eq. 5)
    loss      -log σ(β̃ · log_ratio)
    update    β ← mean of β̃ over the pairs of one optimizer step            (Eq. 6)

Equations: Lee et al., "KL Penalty Control via Perturbation for Direct Preference
Optimization", https://arxiv.org/abs/2502.13177. `batch_beta` is from another paper,
β-DPO.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

BetaMean = Literal["arithmetic", "harmonic"]
# The smallest β of β-DPO, as in its authors' code.
LOWEST_BATCH_BETA = 1e-3


def steps(delta_plus: torch.Tensor, delta_minus: torch.Tensor) -> torch.Tensor:
    """The direction in which the KL penalty of each pair changes (Eq. 5).

    z_λ is the log-probability of chosen minus that of rejected under the policy for
    β/λ. The inequalities are strict: if a difference is exactly 0, the step is 0.

    Args:
        delta_plus: z_{1+ε} - z_1, shape (pairs,), nats.
        delta_minus: z_{1-ε} - z_1, shape (pairs,), nats.

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
    log_ratios: torch.Tensor,
    betas: torch.Tensor,
    label_smoothing: float = 0.0,
    offsets: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """DPO loss of each pair, -log σ(β̃ · log_ratio + offset).

    With label smoothing α it is the conservative DPO loss: the expected loss if each
    label is flipped with probability α.

    Args:
        log_ratios: Shape (pairs,), nats: (log π_θ - log π_ref) of chosen minus that
            of rejected. The loss has a gradient for these only.
        betas: β̃, shape (pairs,); no gradient.
        label_smoothing: α, 0 <= α < 0.5.
        offsets: What is added to the logit β̃ · log_ratio, shape (pairs,).

    Returns:
        Shape (pairs,), nats.
    """
    logits = betas.detach() * log_ratios + offsets
    loss = -(1 - label_smoothing) * F.logsigmoid(logits)
    # log σ(-x) is log(1 - σ(x)) without cancellation
    return loss - label_smoothing * F.logsigmoid(-logits)


def next_beta(
    beta: float, epsilon: float, counts: Sequence[int], mean: BetaMean
) -> float:
    """β after an optimizer step: the mean of its pairs' β̃ (Eq. 6).

    β̃ has only three values, so three counts give its mean. The counts are integers, so
    the result is bitwise the same however the pairs are divided among micro-batches and
    ranks.

    Args:
        beta: β of the step, > 0.
        epsilon: Perturbation, 0 < ε < 1.
        counts: Numbers of pairs with step -1, 0 and +1.
        mean: `arithmetic` is Eq. 6. `harmonic` is β / (1 + ε · mean step), which the
            authors' released code computes.

    Returns:
        β of the next step, > 0. Without pairs it is `beta`.
    """
    down, stay, up = counts
    total = down + stay + up
    if total == 0:
        return beta
    if mean == "harmonic":
        return beta / (1 + epsilon * (up - down) / total)
    return beta * (up / (1 + epsilon) + down / (1 - epsilon) + stay) / total


def batch_beta(beta: float, weight: float, mean_margin: float, average: float) -> float:
    """β of a batch in β-DPO: β₀ [1 + α (mean margin - M₀)].

    Source: Wu et al., "β-DPO: Direct Preference Optimization with Dynamic β",
    https://arxiv.org/abs/2407.08639. Margins are in nats here, as in the authors' code.
    In the paper they are differences of rewards, which are β₀ times as large.

    Args:
        beta: β₀ > 0.
        weight: α >= 0, per nat.
        mean_margin: Mean over the batch of log π_θ - log π_ref of chosen minus that of
            rejected, nats.
        average: M₀, the moving average of `mean_margin`, nats.

    Returns:
        β, at least LOWEST_BATCH_BETA.
    """
    return max(beta * (1 + weight * (mean_margin - average)), LOWEST_BATCH_BETA)
