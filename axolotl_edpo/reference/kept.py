"""What a cache keeps of each pair: hidden states, or two log-probabilities.

    KeptStates   the hidden states of every scored token; with the head they give logits
    KeptLogps    log π_ref of chosen and of rejected

DPO with a fixed β, and β-DPO, need no more than the latter: their losses and margins
are functions of log π_θ - log π_ref of each answer. The perturbed policies of ε-DPO,
and KL(π_θ || π_ref), need the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..data.completions import sum_per_sequence
from ..data.layout import Batch
from ..losses.preference import PreferenceLoss

# The logged metric that needs logits.
KL = "kl/policy_ref"
# Lays out pairs as a batch on the run's device.
LayOut = Callable[[list[dict[str, Any]]], Batch]
# Runs the reference over a batch: (policy, batch) -> a value per scored token.
Run = Callable[[nn.Module, Batch], torch.Tensor]


class KeptPair(NamedTuple):
    """What is kept of a pair, on the CPU.

    Attributes:
        chosen: Hidden states of shape (tokens, hidden), or a number of shape (1,).
        rejected: The same for the rejected answer.
        lengths: Scored tokens of chosen and of rejected.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    lengths: tuple[int, int]

    @property
    def answers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of chosen and of rejected."""
        return self.chosen, self.rejected


class Kept(Protocol):
    """Computes what is kept of pairs. All ranks call it; some may have no pairs."""

    def of(self, pairs: list[dict[str, Any]]) -> list[KeptPair]:
        """Runs the reference over pairs.

        Args:
            pairs: Token columns of each pair, as the data loader yields them.
        """
        ...

    def size(self, pairs: int, tokens: int) -> tuple[int, str]:
        """The bytes of so many pairs with so many scored tokens, and what they are."""
        ...


@dataclass(frozen=True)
class KeptStates:
    """Keeps hidden states.

    Attributes:
        run: Hidden states of the reference, shape (tokens, hidden).
        policy: The policy, wrapped by its engine.
        lay_out: Lays out pairs.
        like: Some hidden states, for their width and dtype.
    """

    run: Run
    policy: nn.Module
    lay_out: LayOut
    like: torch.Tensor

    def of(self, pairs: list[dict[str, Any]]) -> list[KeptPair]:
        """The hidden states of each pair."""
        batch = self.lay_out(pairs)
        states = self.run(self.policy, batch).cpu()
        lengths = batch["lengths"].tolist()
        return _by_pair(states.split(lengths), lengths)

    def size(self, pairs: int, tokens: int) -> tuple[int, str]:
        """A row per scored token."""
        width, dtype = self.like.shape[1], self.like.dtype
        size = tokens * width * dtype.itemsize
        return size, f"{tokens:,} tokens × {width} × {_name(dtype)}"


@dataclass(frozen=True)
class KeptLogps:
    """Keeps a log-probability per answer.

    Attributes:
        run: Log-probabilities of the scored tokens under the reference, nats, float32,
            shape (tokens,).
        policy: The policy, wrapped by its engine.
        lay_out: Lays out pairs.
        loss: Defines the weight of each token.
    """

    run: Run
    policy: nn.Module
    lay_out: LayOut
    loss: PreferenceLoss

    def of(self, pairs: list[dict[str, Any]]) -> list[KeptPair]:
        """log π_ref of chosen and of rejected of each pair, nats, float64."""
        batch = self.lay_out(pairs)
        logps = self.run(self.policy, batch)
        answers = answer_logps(logps, batch["lengths"], self.loss).cpu()
        return _by_pair(answers.split(1), batch["lengths"].tolist())

    def size(self, pairs: int, tokens: int) -> tuple[int, str]:
        """Two numbers per pair."""
        dtype = torch.float64
        return 2 * pairs * dtype.itemsize, f"2 × {_name(dtype)}"


def answer_logps(
    logps: torch.Tensor, lengths: torch.Tensor, loss: PreferenceLoss
) -> torch.Tensor:
    """Sums log-probabilities of tokens over answers.

    In float64, because float32 sums near -1000 are too coarse to subtract.

    Args:
        logps: Shape (tokens,), nats: of all chosen, then of all rejected answers.
        lengths: Shape (2 x pairs,), tokens of each answer.
        loss: Defines the weight of each token (`dpo_ld_alpha`).

    Returns:
        Shape (2 x pairs,), nats, float64.
    """
    weighted = loss.token_weighted(logps.double(), lengths)
    return sum_per_sequence(weighted, lengths)


def logps_folder(fingerprint: str, loss: PreferenceLoss) -> str:
    """The folder of the log-probabilities of answers, for a reference and a loss.

    It is in the folder of the reference's hidden states. With `dpo_ld_alpha` the sums
    are others.
    """
    weighted = "" if loss.ld_alpha == 1 else f"-ld-{loss.ld_alpha}"
    return f"{fingerprint}/answer_logps{weighted}"


def _by_pair(answers: Sequence[torch.Tensor], lengths: list[int]) -> list[KeptPair]:
    """Joins the chosen and the rejected answer of each pair."""
    pairs = len(lengths) // 2
    both = zip(answers[:pairs], answers[pairs : 2 * pairs], strict=True)
    tokens = zip(lengths[:pairs], lengths[pairs:], strict=True)
    return [KeptPair(*pair, of) for pair, of in zip(both, tokens, strict=True)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
