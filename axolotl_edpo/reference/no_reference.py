"""`NoReference`: for the losses that compare answers under the policy alone."""

import torch

from ..data.layout import Batch
from .provider import Reference


class NoReference(Reference):
    """No model at all: log π_ref of every answer is 0, so log-ratios are log π_θ."""

    knows_tokens = False

    def answer_logps(self, policy_logps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Zeros, shape (2 x pairs,), float64."""
        return policy_logps.new_zeros(len(batch["lengths"]), dtype=torch.float64)
