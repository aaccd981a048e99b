"""Stops a run that starts from its reference and is not equal to it.

Policy and reference are the same function until the first update. So in the first
optimizer step, both must give an answer the same log-probability:

    difference = Σ_answers |log π_θ(y) - log π_ref(y)| / Σ_answers tokens of y

It is exactly 0 where both run the same kernels on the same rows. It is rounding where
they do not: under `torch_compile`, or when the reference is read from a cache. Weights
that were loaded or gathered wrongly make it larger than any rounding.

A fault that both share is not seen, such as wrong weights below an adapter. A loss
without a reference has nothing to compare.
"""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from ..distributed import sum_over_ranks

# Bounds of the difference, nats per token; docs/method.md has the measurements.
FLOAT32_BOUND = 0.01
ROUNDED_BOUND = 0.5

CAUSE = "Weights were loaded or gathered wrongly"
OVERFLOW = "or a forward overflows (`fp16: true`: set `bf16: true`)"
AGAIN = "start the run again"
ZERO3 = "with ZeRO-3, install DeepSpeed 0.19.8 or later"
CACHE = "remove the folder of the cache"
PLUGINS = "remove plugins that change one of the two models"


class WrongStart(RuntimeError):
    """Training was stopped: policy and reference differ before the first update."""


class FirstStep:
    """Compares policy and reference in the first optimizer step.

    Args:
        accelerator: The run's accelerator.
        bound: Difference that stops the run, nats per token; None: nothing is checked.
        remedies: What to do then, as parts of a sentence.
    """

    def __init__(
        self, accelerator: Accelerator, bound: float | None, remedies: Sequence[str]
    ):
        self._accelerator = accelerator
        self._bound, self._remedies = bound, remedies
        self._found: list[torch.Tensor] = []

    def observe(self, log_ratios: torch.Tensor, lengths: torch.Tensor) -> None:
        """Compares a micro-batch of the first step; ignores those of later steps.

        All ranks call it. With the last micro-batch, all ranks exchange their largest
        difference, and wait for the device.

        Args:
            log_ratios: Shape (sequences,), log π_θ - log π_ref of each answer, nats.
            lengths: Shape (sequences,), scored tokens of each answer.

        Raises:
            WrongStart: At the last micro-batch, on every rank, if a rank's difference
                is above the bound or not finite.
        """
        if self._bound is None:
            return
        total = log_ratios.detach().abs().sum()
        self._found.append(total / lengths.sum().clamp(min=1))
        if self._accelerator.sync_gradients:
            bound, differences = self._bound, self._of_all_ranks()
            self.end()
            if not all(difference <= bound for difference in differences):
                raise WrongStart(_message(differences, bound, self._remedies))

    def end(self) -> None:
        """Compares nothing from now on: the policy may have learned."""
        self._bound = None
        self._found.clear()

    def _of_all_ranks(self) -> list[float]:
        """The largest difference of each rank; NaN if one of its differences is NaN."""
        accelerator = self._accelerator
        largest = torch.stack(self._found).amax()  # keeps NaN
        slots = largest.new_zeros(accelerator.num_processes)
        slots[accelerator.process_index] = largest
        return sum_over_ranks(accelerator, slots).tolist()


def _message(
    differences: Sequence[float], bound: float, remedies: Sequence[str]
) -> str:
    """What differs, by how much and where, the cause, and what to do.

    Args:
        differences: The largest difference of each rank, nats per token.
        bound: The difference that stops a run.
        remedies: What to do, as parts of a sentence.
    """
    broken = [rank for rank, d in enumerate(differences) if not d <= bound]
    ranks = f"rank{'s' * (len(broken) > 1)} {', '.join(map(str, broken))}"
    largest = max((differences[rank] for rank in broken), key=_nan_last)
    what = f"differ by {largest:.3g} nats per token on {ranks}"
    what, cause = f"{what} (rounding: below {bound:g})", CAUSE
    if not math.isfinite(largest):
        what, cause = f"are not finite on {ranks}", f"{CAUSE}, {OVERFLOW}"
    return (
        "the run starts from its reference, but in step 1 the log-probabilities of "
        f"policy and reference {what}: training stops before a weight changes. "
        f"{cause}: {'; '.join(remedies)}"
    )


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
