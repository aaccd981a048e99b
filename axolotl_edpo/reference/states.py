"""`ReferenceStates`: what the policy is compared with, for the tokens of a batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class ReferenceStates(ABC):
    """Hidden states of the reference, or logits where the head cannot be read.

    If only log-probabilities of answers are kept of it, they take this place.
    """

    @abstractmethod
    def given(self, policy: torch.Tensor) -> torch.Tensor:
        """The reference's states; called inside the policy's forward.

        Args:
            policy: The policy's states of these tokens, shape (tokens, ...); or its
                log-probabilities of the answers, shape (2 x pairs,).

        Returns:
            Those of the reference, in the same shape.
        """


@dataclass(frozen=True)
class ComputedStates(ReferenceStates):
    """States that the reference's forward returned."""

    states: torch.Tensor

    def given(self, policy: torch.Tensor) -> torch.Tensor:
        """Returns the computed states."""
        return self.states


class PolicyStates(ReferenceStates):
    """States of a reference that is still the same function as the policy."""

    def given(self, policy: torch.Tensor) -> torch.Tensor:
        """Returns the policy's states, without gradient."""
        return policy.detach()
