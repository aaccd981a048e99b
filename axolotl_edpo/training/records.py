"""`StepRecords`: logs, traces and counts the pairs of optimizer steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from ..data.layout import Batch
from ..distributed import row_group
from ..ops.token_stats import TokenStats
from .finite_checks import FiniteCheck
from .first_step import FirstStep
from .metrics import Mode, PairMetrics
from .pair_outcomes import PairOutcomes, traced_values
from .pair_trace import PairTrace, flushed_at_end
from .step_counts import StepCounts


class StepRecords:
    """Passes each micro-batch to metrics, trace and counts.

    Args:
        accelerator: The run's accelerator.
        metrics: Computes the means that are logged.
        counts: Counts steps s, and losses that are not finite, on all ranks.
        trace: Writes a row per pair; None: no trace.
        first_step: Compares policy and reference in the first step.

    Attributes:
        metrics: The argument.
        counts: The argument.
        trace: The argument.
        evaluated: Called with each micro-batch of an evaluation, the statistics of its
            scored tokens and the outcomes of its pairs; None: nothing is called.
    """

    evaluated: Callable[[Batch, TokenStats, PairOutcomes], None] | None = None

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: PairMetrics,
        counts: StepCounts,
        trace: PairTrace | None,
        first_step: FirstStep,
    ):
        self._accelerator, self._first_step = accelerator, first_step
        self._traces = row_group(accelerator).rank == 0  # once per row group
        self.metrics, self.counts, self.trace = metrics, counts, trace

    @property
    def finite(self) -> FiniteCheck:
        """The check that stops a run whose losses are not finite."""
        return self.counts.finite

    def add(
        self,
        mode: Mode,
        step: int,
        batch: Batch,
        stats: TokenStats,
        pairs: PairOutcomes,
        router_loss: torch.Tensor | None,
    ) -> None:
        """Adds a micro-batch.

        Args:
            mode: Training or evaluation, which is only logged.
            step: The optimizer step, counted from 1.
            batch: The micro-batch.
            stats: Statistics of its scored tokens.
            pairs: Outcomes of its pairs.
            router_loss: Router loss of a mixture of experts, shape (); or None.

        Raises:
            WrongStart: At the last micro-batch of the first step, if policy and
                reference differ.
            Diverged: At the last micro-batch of a step in which a loss is not finite.
        """
        self.metrics.add(mode, batch, stats, pairs, router_loss)
        if mode == "eval":
            if self.evaluated is not None and self._traces:
                self.evaluated(batch, stats, pairs)
            return
        if self.trace is not None and self._traces and self.trace.is_due(step):
            with self.trace.timed():
                values = traced_values(pairs, stats, batch["lengths"])
                self.trace.observe(step, batch["examples"].pairs, values)
        self._first_step.observe(pairs.log_ratios, batch["lengths"])
        self.counts.observe(pairs.steps, pairs.losses, step)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the optimizer skipped the step that has just ended."""
        return self._accelerator.optimizer_step_was_skipped

    def begin(self, step: int, removes: bool) -> None:
        """Drops what another run has left; all ranks call it at the start of training.

        Args:
            step: The step of the resumed checkpoint; 0 for a new run.
            removes: Whether this rank removes files of the trace.
        """
        self.finite.take()  # of a run that has failed
        if step:
            self._first_step.end()
        if self.trace is not None:
            if removes:
                self.trace.drop_after(step)
            self._accelerator.wait_for_everyone()  # no rank writes before

    def flush(self) -> None:
        """Writes the trace so far."""
        if self.trace is not None:
            self.trace.flush()

    def flushed_at_end(self) -> AbstractContextManager[None]:
        """A context around training; see `pair_trace.flushed_at_end`."""
        return flushed_at_end(self.trace)
