"""Weighted means that stay on the device until they are logged.

A mean over an optimizer step must not depend on how the step was cut: a micro-batch
of one pair weighs a fourth of one of four. So sums, on the device, and weights, on the
host, are kept apart, reduced over ranks once, and divided last.
"""

from collections.abc import Callable

import torch

from ..background import on_device


class WeightedMeans:
    """Sums and weights by name."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, int] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds values of equal weight, one per pair or per token.

        Args:
            name: What is logged.
            values: Shape (n,), any n.
        """
        total = values.detach().float().sum()
        before = self._sums.get(name)
        self._sums[name] = total if before is None else before + total
        self._weights[name] = self._weights.get(name, 0) + values.numel()

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Means over everything added since the last call, and starts anew.

        Args:
            reduce: Sums a tensor of shape (names, 2) over all ranks.

        Returns:
            name -> mean; 0.0 for a name whose weight is 0.
        """
        if not self._sums:
            return {}
        names, sums = list(self._sums), torch.stack([*self._sums.values()])
        weights = torch.tensor([*self._weights.values()], dtype=sums.dtype)
        own = torch.stack([sums, on_device(weights, sums.device)], dim=1)
        totals = reduce(own).tolist()
        self._sums.clear()
        self._weights.clear()
        return {
            name: total / weight if weight else 0.0
            for name, (total, weight) in zip(names, totals, strict=True)
        }
