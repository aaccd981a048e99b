"""The losses that `dpo_loss_type` names, with a β of its own for every pair.

With w and l the log-ratios log π_θ - log π_ref of chosen and rejected answer, summed
over their |w| and |l| tokens, β the pair's own β̃ and α `dpo_label_smoothing`:

    sigmoid        -(1-α) log σ(β(w - l)) - α log σ(-β(w - l))     DPO, 2305.18290
    robust         the same with -α/(1-2α) for α                   2403.00409
    hinge          max(0, 1 - β(w - l))                            SLiC, 2305.10425
    ipo            (w/|w| - l/|l| - 1/(2β))²                       IPO, 2310.12036
    sigmoid_norm   -log σ(β(w/|w| - l/|l|))                        Tülu 3, 2411.15124
    exo_pair       KL((q, 1-q) || (1-α, α)), q = σ(β(w - l))       EXO, 2402.00856
    nca_pair       -log σ(βw) - ½ log σ(-βw) - ½ log σ(-βl)        NCA, 2402.05369
    bco_pair       -log σ(βw) - log σ(-βl)                         BCO, 2404.04656
    sppo_hard      (w - 1/(2β))² + (l + 1/(2β))²                   SPPO, 2405.00675
    apo_zero       1 - σ(βw) + σ(βl)                               APO, 2408.06266
    apo_down       σ(βw) + 1 - σ(β(w - l))                         the same
    discopop       logistic and exponential loss, blended          2406.08414
    sft            -log π_θ of the chosen answers, per token       RPO, 2404.19733

Numbers are those of arXiv. Where all β are equal, each is what TRL computes; only
TRL's `sigmoid` leaves α out. `sft` has no β and stands beside one that has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import refuse
from .edpo import preference_loss

SFT = "sft"
# The blend's temperature: TRL's default, and axolotl has no key for it.
DISCOPOP_TAU = 0.05


class Answers(NamedTuple):
    """What a loss knows of its pairs; each of shape (pairs,).

    Attributes:
        chosen: log π_θ - log π_ref of the chosen answer, nats, with gradient.
        rejected: The same of the rejected one.
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
    def of(
        cls, log_ratios: torch.Tensor, lengths: torch.Tensor, betas: torch.Tensor
    ) -> "Answers":
        """Of a batch of sequences, all chosen, then all rejected.

        Args:
            log_ratios: Shape (2 x pairs,), nats.
            lengths: Shape (2 x pairs,), tokens.
            betas: Shape (pairs,).
        """
        (chosen, rejected), tokens = log_ratios.chunk(2), lengths.chunk(2)
        return cls(chosen, rejected, tokens[0], tokens[1], betas)

    @property
    def margins(self) -> torch.Tensor:
        """chosen - rejected, nats."""
        return self.chosen - self.rejected

    @property
    def mean_margins(self) -> torch.Tensor:
        """The same of means per token."""
        chosen = self.chosen / self.chosen_tokens.clamp(min=1)
        return chosen - self.rejected / self.rejected_tokens.clamp(min=1)


def _sigmoid(a: Answers, smoothing: float) -> torch.Tensor:
    return preference_loss(a.margins, a.betas, smoothing)


def _robust(a: Answers, smoothing: float) -> torch.Tensor:
    return preference_loss(a.margins, a.betas, -smoothing / (1 - 2 * smoothing))


def _hinge(a: Answers, smoothing: float) -> torch.Tensor:
    return F.relu(1 - a.betas * a.margins)


def _ipo(a: Answers, smoothing: float) -> torch.Tensor:
    return (a.mean_margins - 0.5 / a.betas) ** 2


def _sigmoid_norm(a: Answers, smoothing: float) -> torch.Tensor:
    return preference_loss(a.mean_margins, a.betas)


def _exo_pair(a: Answers, smoothing: float) -> torch.Tensor:
    x = a.betas * a.margins
    right = F.logsigmoid(x) - math.log1p(-smoothing)
    wrong = F.logsigmoid(-x) - math.log(smoothing)
    return x.sigmoid() * right + (-x).sigmoid() * wrong


def _nca_pair(a: Answers, smoothing: float) -> torch.Tensor:
    chosen, rejected = a.betas * a.chosen, a.betas * a.rejected
    pushed = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * pushed


def _bco_pair(a: Answers, smoothing: float) -> torch.Tensor:
    return -F.logsigmoid(a.betas * a.chosen) - F.logsigmoid(-a.betas * a.rejected)


def _sppo_hard(a: Answers, smoothing: float) -> torch.Tensor:
    goal = 0.5 / a.betas
    return (a.chosen - goal) ** 2 + (a.rejected + goal) ** 2


def _apo_zero(a: Answers, smoothing: float) -> torch.Tensor:
    return (-a.betas * a.chosen).sigmoid() + (a.betas * a.rejected).sigmoid()


def _apo_down(a: Answers, smoothing: float) -> torch.Tensor:
    return (a.betas * a.chosen).sigmoid() + (-a.betas * a.margins).sigmoid()


def _discopop(a: Answers, smoothing: float) -> torch.Tensor:
    x = a.betas * a.margins
    return torch.lerp(-F.logsigmoid(x), (-x).exp(), (x / DISCOPOP_TAU).sigmoid())


LOSSES: dict[str, Callable[[Answers, float], torch.Tensor]] = {
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
SMOOTHED = ("sigmoid", "robust", "exo_pair")
# Losses of TRL in which a β per pair means nothing -> why.
REFUSED = dict.fromkeys(
    ("aot", "aot_unpaired"),
    "it sorts the answers of a micro-batch, so that none has a β of its own",
)


@dataclass(frozen=True)
class LossSettings:
    """What a recipe says of the loss.

    Attributes:
        types: Names of LOSSES, or `sft`.
        weights: One per type.
        label_smoothing: α, 0 <= α < 0.5.
        weighted: Whether pairs weigh as much as the policy is likely to write them
            (`dpo_use_weighting`; WPO, arXiv 2406.11827).
        ld_alpha: How much a token counts beyond the length of its pair's shorter
            answer, 0 <= α <= 1 (`dpo_ld_alpha`; LD-DPO, arXiv 2409.06411).

    Raises:
        ValueError: If the loss would not be what they say.
    """

    types: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    weighted: bool = False
    ld_alpha: float = 1.0

    def __post_init__(self) -> None:
        for name in self.types:
            _check_type(name)
        _check_weights(self.types, self.weights)
        _check_smoothing(self.types, self.label_smoothing)
        if all(name == SFT for name in self.types):
            refuse("dpo_loss_type", [*self.types], "add one with a β, like `sigmoid`")
        if self.weighted and SFT in self.types:
            remedy = "remove it, or `sft`, which is a mean over tokens, not over pairs"
            refuse("dpo_use_weighting", True, remedy)
        if not 0 <= self.ld_alpha <= 1:
            refuse("dpo_ld_alpha", self.ld_alpha, "set a number from 0 to 1")

    @property
    def sft_weight(self) -> float:
        """Weight of `sft`, 0 without it."""
        return self._weights().get(SFT, 0.0)

    def losses(self, answers: Answers) -> torch.Tensor:
        """Weighted sum of all types but `sft`.

        Args:
            answers: Of some pairs.

        Returns:
            Shape (pairs,).
        """
        losses = torch.zeros_like(answers.chosen)
        for name, weight in self._weights().items():
            if name != SFT:
                losses = losses + weight * LOSSES[name](answers, self.label_smoothing)
        return losses

    def counted(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Values of tokens, times how much each token counts.

        Args:
            values: Shape (tokens,), all chosen, then all rejected answers.
            lengths: Shape (2 x pairs,), tokens of each answer.

        Returns:
            Shape (tokens,).
        """
        if self.ld_alpha == 1:
            return values
        return values * tail_weights(lengths, len(values), self.ld_alpha)

    def _weights(self) -> Mapping[str, float]:
        return dict(zip(self.types, self.weights, strict=True))


def wpo_weights(relative_logps: torch.Tensor) -> torch.Tensor:
    """How much each pair weighs, by how likely the policy is to write it (WPO, Eq. 2).

    Args:
        relative_logps: Shape (2 x pairs,), all chosen, then all rejected: the mean over
            an answer's tokens of log p(y) - log Σ_v p(v)², p the policy.

    Returns:
        Shape (pairs,), above 0, no gradient.
    """
    chosen, rejected = relative_logps.detach().chunk(2)
    return (chosen + rejected).exp()


def tail_weights(lengths: torch.Tensor, tokens: int, alpha: float) -> torch.Tensor:
    """1 up to the length of a pair's shorter answer, α beyond it (LD-DPO).

    Args:
        lengths: Shape (2 x pairs,), tokens of all chosen, then of all rejected answers.
        tokens: Their sum.
        alpha: 0 <= α <= 1.

    Returns:
        Shape (tokens,), float32.
    """
    chosen, rejected = lengths.chunk(2)
    ends = lengths.cumsum(0)
    shared = ends - lengths + torch.minimum(chosen, rejected).repeat(2)
    limits = torch.repeat_interleave(shared, lengths, output_size=tokens)
    within = torch.arange(tokens, device=lengths.device) < limits
    return torch.where(within, 1.0, alpha)


def _check_type(name: str) -> None:
    if name in REFUSED:
        refuse("dpo_loss_type", name, f"{REFUSED[name]}; use another, or `rl: dpo`")
    if name not in (*LOSSES, SFT):
        refuse("dpo_loss_type", name, f"use one of {', '.join((*LOSSES, SFT))}")


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
