"""Weighted means that stay on the device until they are logged.

A mean over an optimizer step must not depend on how the step was cut: a micro-batch
of one pair weighs a fourth of one of four. So sums and weights are kept apart, added
up on the device, reduced over ranks once, and divided last.
"""

from collections.abc import Callable

import torch


class WeightedMeans:
    """Sums and weights by name."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds values of equal weight, one per pair or per token.

        Args:
            name: What is logged.
            values: Shape (n,), any n.
        """
        total = values.detach().float().sum()
        entry = torch.stack([total, torch.full_like(total, values.numel())])
        self._sums[name] = self._sums.get(name, 0) + entry

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Means over everything added since the last call, and starts anew.

        Args:
            reduce: Sums a tensor of shape (names, 2) over all ranks.

        Returns:
            name -> mean; 0.0 for a name whose weight is 0.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {
            name: total / weight if weight else 0.0
            for name, (total, weight) in zip(names, sums, strict=True)
        }
