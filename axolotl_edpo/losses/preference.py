"""The losses of `dpo_loss_type`, with one β per pair.

w and l are the log-ratios log π_θ - log π_ref of the chosen and the rejected answer.
Each is a sum over the tokens of its answer; |w| and |l| are the numbers of tokens. β is
the β̃ of the pair, α is `dpo_label_smoothing`, and ρ is `edpo_length_penalty`:

    sigmoid        -(1-α) log σ(x) - α log σ(-x),                  DPO, 2305.18290
                   x = β(w - l) + ρ(|w| - |l|)                     R-DPO, 2403.19159
    robust         `sigmoid` with -α/(1-2α) in place of α          2403.00409
    hinge          max(0, 1 - β(w - l))                            SLiC, 2305.10425
    ipo            (w/|w| - l/|l| - 1/(2β))²                       IPO, 2310.12036
    sigmoid_norm   -log σ(β(w/|w| - l/|l|))                        Tülu 3, 2411.15124
    exo_pair       KL((q, 1-q) || (1-α, α)), q = σ(β(w - l))       EXO, 2402.00856
    nca_pair       -log σ(βw) - ½ log σ(-βw) - ½ log σ(-βl)        NCA, 2402.05369
    bco_pair       -log σ(βw) - log σ(-βl)                         BCO, 2404.04656
    sppo_hard      (w - 1/(2β))² + (l + 1/(2β))²                   SPPO, 2405.00675
    apo_zero       1 - σ(βw) + σ(βl)                               APO, 2408.06266
    apo_down       σ(βw) + 1 - σ(β(w - l))                         APO, 2408.06266
    discopop       -(1-g) log σ(x) + g e^-x, x = β(w - l), g = σ(x/τ)     2406.08414
    sft            -log π_θ of the chosen answers, per token       RPO, 2404.19733

The numbers are arXiv's. If all pairs have the same β, the losses are those of TRL, with
one exception: TRL's `sigmoid` ignores α. `sft` has no β, so it cannot be the only loss.

R-DPO (ρ > 0; α in its paper) lowers the reward of an answer by ρ per token. That is DPO
for another reward, which Proposition 1 of ε-DPO allows, and the term is the same under
every β. So Δ±, the step s, the margins of β-DPO and the movement of β are functions of
log-ratios alone. The logged rewards stay β(log π_θ - log π_ref), as in TRL.

`reference_free.py` has the losses without a reference, each of which stands alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import refuse
from .edpo import preference_loss
from .reference_free import (
    NLL_WEIGHT,
    REFERENCE_FREE,
    ReferenceFreeLoss,
    Terms,
    reference_free,
)

SFT = "sft"
# τ of `discopop`: TRL's default. axolotl has no key for it.
DISCOPOP_TAU = 0.05


class Answers(NamedTuple):
    """What a loss needs of the answers of each pair. Every field has shape (pairs,).

    Attributes:
        chosen: log π_θ - log π_ref of the chosen answer, nats, with gradient; without a
            reference log π_θ.
        rejected: The same of the rejected answer.
        chosen_tokens: Tokens of the chosen answer.
        rejected_tokens: Tokens of the rejected answer.
        betas: β̃ of each pair, no gradient.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    betas: torch.Tensor

    @classmethod
    def from_sequences(
        cls, log_ratios: torch.Tensor, lengths: torch.Tensor, betas: torch.Tensor
    ) -> "Answers":
        """Splits the values of sequences: all chosen, then all rejected.

        Args:
            log_ratios: log π_θ - log π_ref, shape (2 x pairs,), nats.
            lengths: Tokens of each answer, shape (2 x pairs,).
            betas: β̃ of each pair, shape (pairs,).
        """
        chosen, rejected = log_ratios.chunk(2)
        chosen_tokens, rejected_tokens = lengths.chunk(2)
        return cls(chosen, rejected, chosen_tokens, rejected_tokens, betas)

    @property
    def margins(self) -> torch.Tensor:
        """Log-ratio of chosen minus that of rejected, nats; shape (pairs,)."""
        return self.chosen - self.rejected

    @property
    def chosen_rewards(self) -> torch.Tensor:
        """β̃ times the log-ratio of chosen; shape (pairs,)."""
        return self.betas * self.chosen

    @property
    def rejected_rewards(self) -> torch.Tensor:
        """β̃ times the log-ratio of rejected; shape (pairs,)."""
        return self.betas * self.rejected

    @property
    def reward_margins(self) -> torch.Tensor:
        """β̃ times the margin; shape (pairs,)."""
        return self.betas * self.margins

    @property
    def length_differences(self) -> torch.Tensor:
        """Tokens of chosen minus tokens of rejected; shape (pairs,)."""
        return self.chosen_tokens - self.rejected_tokens

    @property
    def mean_margins(self) -> torch.Tensor:
        """The margin of log-ratios per token, nats per token; shape (pairs,)."""
        chosen = self.chosen / self.chosen_tokens.clamp(min=1)
        return chosen - self.rejected / self.rejected_tokens.clamp(min=1)


def _sigmoid(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    return _smoothed(answers, loss, loss.label_smoothing)


def _robust(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    return _smoothed(
        answers, loss, -loss.label_smoothing / (1 - 2 * loss.label_smoothing)
    )


def _smoothed(
    answers: Answers, loss: "PreferenceLoss", smoothing: float
) -> torch.Tensor:
    penalties = loss.length_penalty * answers.length_differences
    return preference_loss(answers.margins, answers.betas, smoothing, penalties)


def _hinge(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    return F.relu(1 - answers.reward_margins)


def _ipo(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    return (answers.mean_margins - 0.5 / answers.betas) ** 2


def _sigmoid_norm(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    return preference_loss(answers.mean_margins, answers.betas)


def _exo_pair(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    x = answers.reward_margins
    right = F.logsigmoid(x) - math.log1p(-loss.label_smoothing)
    wrong = F.logsigmoid(-x) - math.log(loss.label_smoothing)
    return x.sigmoid() * right + (-x).sigmoid() * wrong


def _nca_pair(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    chosen, rejected = answers.chosen_rewards, answers.rejected_rewards
    lowered = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * lowered


def _bco_pair(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    chosen, rejected = answers.chosen_rewards, answers.rejected_rewards
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def _sppo_hard(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    target = 0.5 / answers.betas
    return (answers.chosen - target) ** 2 + (answers.rejected + target) ** 2


def _apo_zero(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    # 1 - σ(x) = σ(-x)
    return (-answers.chosen_rewards).sigmoid() + answers.rejected_rewards.sigmoid()


def _apo_down(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    return answers.chosen_rewards.sigmoid() + (-answers.reward_margins).sigmoid()


def _discopop(answers: Answers, loss: "PreferenceLoss") -> torch.Tensor:
    x = answers.reward_margins
    return torch.lerp(-F.logsigmoid(x), (-x).exp(), (x / DISCOPOP_TAU).sigmoid())


LOSSES: dict[str, Callable[[Answers, "PreferenceLoss"], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
# Losses that use α.
SMOOTHED = ("sigmoid", "robust", "exo_pair")
# Losses that use ρ.
PENALIZED = ("sigmoid", "robust")
# Losses of TRL that cannot have a β per pair, with the reason.
REFUSED = dict.fromkeys(
    ("aot", "aot_unpaired"),
    "it sorts the answers of a micro-batch, so that none has a β of its own",
)


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a recipe: a weighted sum of the losses in `types`.

    Attributes:
        types: Names in LOSSES, or `sft`; or one of REFERENCE_FREE.
        weights: Weight of each type in the sum, > 0.
        label_smoothing: α, the assumed share of flipped labels, 0 <= α < 0.5.
        weighted: Whether `wpo_weights` multiply the losses of pairs
            (`dpo_use_weighting`; WPO, arXiv 2406.11827).
        ld_alpha: Weight of those tokens of the longer answer that are beyond the length
            of the shorter one, from 0 to 1 (`dpo_ld_alpha`; LD-DPO, arXiv 2409.06411).
        length_penalty: ρ >= 0, by which each token lowers the reward of its answer
            (`edpo_length_penalty`; R-DPO, arXiv 2403.19159).
        terms: Settings of a loss without a reference.

    Raises:
        ValueError: If a type is unknown, or if two settings contradict each other.
    """

    types: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    weighted: bool = False
    ld_alpha: float = 1.0
    length_penalty: float = 0.0
    terms: Terms = Terms()

    def __post_init__(self) -> None:
        for name in self.types:
            _check_type(name)
        _check_weights(self.types, self.weights)
        _check_smoothing(self.types, self.label_smoothing)
        _check_penalty(self.types, self.length_penalty)
        if all(name == SFT for name in self.types):
            refuse("dpo_loss_type", [*self.types], "add one with a β, like `sigmoid`")
        if self.weighted and SFT in self.types:
            remedy = "remove it, or `sft`, which is a mean over tokens, not over pairs"
            refuse("dpo_use_weighting", True, remedy)
        if not 0 <= self.ld_alpha <= 1:
            refuse("dpo_ld_alpha", self.ld_alpha, "set a number from 0 to 1")
        if not self.has_reference:
            _check_reference_free(self)

    @property
    def reference_free(self) -> ReferenceFreeLoss | None:
        """The loss, if it has no reference; else None."""
        return reference_free(self.types)

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.reference_free is None

    @property
    def sft_weight(self) -> float:
        """Weight of the mean of -log π_θ over chosen tokens, as `sft` or as NLL."""
        if self.reference_free is not None:
            return self.weights[0] * self.reference_free.weight_of_nll(self.terms)
        return self._weights().get(SFT, 0.0)

    def rewards(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """β̃ times what the loss compares: log-ratios, or scores under the policy.

        Args:
            answers: The log-ratios, lengths and β̃ of the pairs.

        Returns:
            Of chosen and of rejected answers, each of shape (pairs,), no gradient.
        """
        chosen, rejected = self._scores(answers)
        return answers.betas * chosen.detach(), answers.betas * rejected.detach()

    def losses(self, answers: Answers) -> torch.Tensor:
        """Weighted sum of all types for each pair, without `sft` and NLL.

        Args:
            answers: The log-ratios, lengths and β̃ of the pairs.

        Returns:
            Shape (pairs,), with gradient.
        """
        if self.reference_free is not None:
            chosen, rejected = self._scores(answers)
            formula = self.reference_free.loss
            losses = formula(chosen - rejected, answers.betas, self.terms)
            return self.weights[0] * losses
        losses = torch.zeros_like(answers.chosen)
        for name, weight in self._weights().items():
            if name != SFT:
                losses = losses + weight * LOSSES[name](answers, self)
        return losses

    def token_weighted(
        self, values: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Multiplies the value of each token with its weight, see `tail_weights`.

        Args:
            values: Shape (tokens,): tokens of all chosen, then of all rejected answers.
            lengths: Shape (2 x pairs,), tokens of each answer.

        Returns:
            Shape (tokens,).
        """
        if self.ld_alpha == 1:
            return values
        return values * tail_weights(lengths, len(values), self.ld_alpha)

    def _scores(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-ratios of chosen and rejected, or scores without a reference."""
        if self.reference_free is None:
            return answers.chosen, answers.rejected
        score = self.reference_free.score
        chosen = score(answers.chosen, answers.chosen_tokens)
        return chosen, score(answers.rejected, answers.rejected_tokens)

    def _weights(self) -> Mapping[str, float]:
        return dict(zip(self.types, self.weights, strict=True))


def wpo_weights(relative_logps: torch.Tensor) -> torch.Tensor:
    """Weight of each pair: larger if the policy is likely to write it (WPO, Eq. 2).

    Args:
        relative_logps: Shape (2 x pairs,), nats, all chosen, then all rejected: the
            mean over an answer's tokens of log p(y) - log Σ_v p(v)², with p the policy.

    Returns:
        Shape (pairs,), above 0, no gradient.
    """
    chosen, rejected = relative_logps.detach().chunk(2)
    return (chosen + rejected).exp()


def tail_weights(lengths: torch.Tensor, tokens: int, alpha: float) -> torch.Tensor:
    """Weight of each token: 1 up to the length of the shorter answer, then α (LD-DPO).

    Args:
        lengths: Shape (2 x pairs,): tokens of each answer, all chosen, then all
            rejected.
        tokens: The sum of `lengths`.
        alpha: α, 0 <= α <= 1.

    Returns:
        Shape (tokens,), float32.
    """
    chosen, rejected = lengths.chunk(2)
    ends = lengths.cumsum(0)
    tails = ends - lengths + torch.minimum(chosen, rejected).repeat(2)
    starts_of_tails = torch.repeat_interleave(tails, lengths, output_size=tokens)
    before_tail = torch.arange(tokens, device=lengths.device) < starts_of_tails
    return torch.where(before_tail, 1.0, alpha)


def _check_type(name: str) -> None:
    if name in REFUSED:
        refuse("dpo_loss_type", name, f"{REFUSED[name]}; use another, or `rl: dpo`")
    known = (*LOSSES, SFT, *REFERENCE_FREE)
    if name not in known:
        refuse("dpo_loss_type", name, f"use one of {', '.join(known)}")


def _check_weights(types: Sequence[str], weights: Sequence[float]) -> None:
    if len(types) != len(set(types)):
        refuse("dpo_loss_type", [*types], "name each loss once")
    if len(weights) != len(types):
        remedy = f"give one for each `dpo_loss_type`, of which there are {len(types)}"
        refuse("dpo_loss_weights", [*weights], remedy)
    if not all(math.isfinite(w) and w > 0 for w in weights):
        refuse("dpo_loss_weights", [*weights], "use numbers above 0")


def _check_smoothing(types: Sequence[str], smoothing: float) -> None:
    key, users = "dpo_label_smoothing", [t for t in types if t in SMOOTHED]
    if not 0 <= smoothing < 0.5:
        refuse(key, smoothing, "set a value from 0 to below 0.5")
    if smoothing and not users:
        remedy = f"remove it: of the losses, only {', '.join(SMOOTHED)} have it"
        refuse(key, smoothing, remedy)
    if "exo_pair" in types and not smoothing:
        refuse(key, smoothing, "`exo_pair` needs it above 0, its paper has 0.001")


def _check_penalty(types: Sequence[str], penalty: float) -> None:
    if penalty and not any(name in PENALIZED for name in types):
        remedy = f"remove it: of the losses, only {', '.join(PENALIZED)} have it"
        refuse("edpo_length_penalty", penalty, remedy)


def _check_reference_free(loss: PreferenceLoss) -> None:
    if len(loss.types) > 1:
        alone = f"{', '.join(REFERENCE_FREE)} have no reference, and stand alone"
        instead = (
            f"; `{NLL_WEIGHT}` takes the place of `sft`" if SFT in loss.types else ""
        )
        refuse("dpo_loss_type", [*loss.types], f"name one loss: {alone}{instead}")
    if loss.weighted:
        refuse("dpo_use_weighting", True, "remove it: WPO weighs losses of log-ratios")
    if loss.ld_alpha != 1:
        remedy = "remove it: LD-DPO weighs log-ratios of tokens"
        refuse("dpo_ld_alpha", loss.ld_alpha, remedy)
