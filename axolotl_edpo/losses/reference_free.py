"""The losses of `dpo_loss_type` that have no reference: the policy's scores alone.

w and l are log π_θ of the chosen and the rejected answer, summed over its tokens; |w|
and |l| are the numbers of tokens. NLL is -log π_θ of the chosen answers, per token:

    cpo      -log σ(β(w - l)) + α NLL               CPO, 2401.08417, Eq. 3, with L_NLL
    slic     max(0, δ - w + l) + α NLL              SLiC-HF, 2305.10425, Eq. 1
    rrhf     max(0, l/|l| - w/|w|) + α NLL          RRHF, 2304.05302, Eqs. 1, 2 and 4
    simpo    -log σ(β(w/|w| - l/|l|) - γ) + α NLL   SimPO, 2405.14734, Eq. 6
    orpo     NLL - λ log σ(o(w/|w|) - o(l/|l|))     ORPO, 2403.07691, Eqs. 4, 6 and 7

with o(x) = x - log(1 - e^x), the log odds of e^x. The numbers are arXiv's. Each is a
function of the difference of two scores, one per answer. `slic`, `rrhf` and `orpo` have
no β. α is 0 in the paper of SimPO, and 1 in those of CPO and RRHF.

The NLL is a mean over the chosen tokens of an optimizer step, as that of `sft`. The
papers of CPO, SLiC-HF and RRHF sum it over an answer. In TRL that of CPO is a mean over
tokens as here, and that of ORPO includes the tokens of prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .edpo import preference_loss

BETA, GAMMA, DELTA = "beta", "simpo_gamma", "edpo_slic_delta"
NLL_WEIGHT, ODDS_WEIGHT = "cpo_alpha", "orpo_alpha"
# All keys of which some of these losses, and no other loss, make use.
TERM_KEYS = (GAMMA, DELTA, NLL_WEIGHT, ODDS_WEIGHT)


@dataclass(frozen=True)
class Terms:
    """Settings of the losses that have no reference.

    Attributes:
        gamma: γ of `simpo`, >= 0 (`simpo_gamma`; TRL's default).
        delta: δ of `slic`, nats, > 0 (`edpo_slic_delta`).
        nll_weight: α, >= 0 (`cpo_alpha`); None: the α of the loss's paper.
        odds_weight: λ of `orpo`, > 0 (`orpo_alpha`; TRL's default).
    """

    gamma: float = 0.5
    delta: float = 1.0
    nll_weight: float | None = None
    odds_weight: float = 0.1

    @classmethod
    def from_config(cls, cfg: Any) -> "Terms":
        """The settings of a recipe.

        Args:
            cfg: axolotl's config, validated.
        """
        given = {
            "gamma": cfg.simpo_gamma,
            "delta": cfg.edpo_slic_delta,
            "nll_weight": cfg.cpo_alpha,
            "odds_weight": cfg.orpo_alpha,
        }
        return cls(
            **{name: value for name, value in given.items() if value is not None}
        )


class ReferenceFreeLoss(NamedTuple):
    """A loss that compares the scores of two answers under the policy.

    Attributes:
        score: Takes log π_θ of answers, nats, and their numbers of tokens, both of
            shape (answers,). Returns their scores, of the same shape.
        loss: Takes the chosen scores minus the rejected ones and β, both of shape
            (pairs,), and the terms. Returns the losses without the NLL, of that shape.
        nll_weight: Weight of the NLL in the loss's paper.
        keys: Keys of a recipe that the loss uses.
    """

    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor, Terms], torch.Tensor]
    nll_weight: float
    keys: Sequence[str]

    @property
    def has_beta(self) -> bool:
        """Whether β is a factor of the scores."""
        return BETA in self.keys

    def weight_of_nll(self, terms: Terms) -> float:
        """Weight of the NLL beside the loss."""
        given = terms.nll_weight if NLL_WEIGHT in self.keys else None
        return self.nll_weight if given is None else given


def _total(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logps


def _mean(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logps / tokens.clamp(min=1)


def _log_odds(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    # the odds of an answer that is certain are infinite, and have no gradient
    means = _mean(logps, tokens).clamp(max=-torch.finfo(logps.dtype).eps)
    return means - (-means.expm1()).log()


def _cpo(margins: torch.Tensor, betas: torch.Tensor, terms: Terms) -> torch.Tensor:
    return preference_loss(margins, betas)


def _slic(margins: torch.Tensor, betas: torch.Tensor, terms: Terms) -> torch.Tensor:
    return F.relu(terms.delta - margins)


def _rrhf(margins: torch.Tensor, betas: torch.Tensor, terms: Terms) -> torch.Tensor:
    return F.relu(-margins)


def _simpo(margins: torch.Tensor, betas: torch.Tensor, terms: Terms) -> torch.Tensor:
    return -F.logsigmoid(betas * margins - terms.gamma)


def _orpo(margins: torch.Tensor, betas: torch.Tensor, terms: Terms) -> torch.Tensor:
    return -terms.odds_weight * F.logsigmoid(margins)


REFERENCE_FREE = {
    "cpo": ReferenceFreeLoss(_total, _cpo, 1.0, (BETA, NLL_WEIGHT)),
    "slic": ReferenceFreeLoss(_total, _slic, 1.0, (DELTA, NLL_WEIGHT)),
    "rrhf": ReferenceFreeLoss(_mean, _rrhf, 1.0, (NLL_WEIGHT,)),
    "simpo": ReferenceFreeLoss(_mean, _simpo, 0.0, (BETA, GAMMA, NLL_WEIGHT)),
    "orpo": ReferenceFreeLoss(_log_odds, _orpo, 1.0, (ODDS_WEIGHT,)),
}


def reference_free(types: Sequence[str] | None) -> ReferenceFreeLoss | None:
    """The loss without a reference that a recipe has, or None.

    Args:
        types: `dpo_loss_type`.
    """
    found = (REFERENCE_FREE[name] for name in types or () if name in REFERENCE_FREE)
    return next(found, None)
