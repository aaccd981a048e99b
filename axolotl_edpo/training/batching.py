"""`PairBatcher`: the pairs of an optimizer step, laid out in micro-batches.

    data loader → pairs of an optimizer step, on this rank → micro-batches

The data loader yields pairs as lists of tokens. A step is laid out once all its pairs
have been read, for two reasons: pairs are balanced by tokens over the whole step, and
accelerate may repeat pairs in the last micro-batch, which are left out. While a step
runs, the next one is laid out in the background.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from ..background import copied, in_background, pinned
from ..data.collator import pairs_in
from ..data.layout import Batch, LayoutSettings, each_tensor
from ..distributed import count_over_ranks, data_ranks

# Lays out the pairs of a micro-batch.
Collator = Any
# A micro-batch as the data loader yields it: pairs that are not laid out yet.
RawBatch = dict[str, Any]
# transformers' `get_batch_samples`: takes an iterator and a number, and returns up to
# so many micro-batches. The second result, a token count, is not used.
Read = Callable[[Iterator, int], tuple[list[RawBatch], Any]]


class NextStep(NamedTuple):
    """The optimizer step that follows the running one.

    Attributes:
        source: The iterator that yielded the micro-batches.
        raw: The micro-batches, as the data loader yields them.
        laid_out: The same micro-batches, laid out.
    """

    source: weakref.ref
    raw: list[RawBatch]
    laid_out: "Future[list[Batch]]"


class PairBatcher:
    """Reads and lays out the micro-batches of optimizer steps and evaluations.

    Args:
        accelerator: The run's accelerator.
        make_collator: Makes a collator; `packs` and `shares` are those of
            `PairCollator`.
        layout: How pairs are laid out.
        device: The device of the model.
        drops_last: Whether the data loader drops a last, smaller micro-batch.

    Attributes:
        layout: How pairs are laid out; `use` changes it.
        collators: The collators of modes `train` and `eval`.
        device: The device of the model.
        next_step: The step that was read ahead, or None.
    """

    layout: LayoutSettings
    collators: dict[str, Collator]

    def __init__(
        self,
        accelerator: Accelerator,
        make_collator: Callable[..., Collator],
        layout: LayoutSettings,
        device: torch.device,
        drops_last: bool,
    ):
        self._accelerator, self.device = accelerator, device
        self._make_collator, self._drops_last = make_collator, drops_last
        self.next_step: NextStep | None = None
        self.use(layout)

    def use(self, layout: LayoutSettings) -> None:
        """Changes how pairs are laid out from now on."""
        self.layout = layout
        packs = {"train": layout.packs, "eval": layout.eval_packs}
        self.collators = {
            mode: self._make_collator(packs=packs[mode], shares=bool(layout.shares))
            for mode in packs
        }

    # --- an optimizer step -----------------------------------------------------------

    def step(
        self, source: Iterator, count: int, read: Read, has_next: bool
    ) -> list[Batch]:
        """The micro-batches of an optimizer step.

        Reads the next step as well, and lays it out in the background.

        Args:
            source: The data loader's iterator.
            count: Micro-batches of a step. The last step of an epoch may have fewer.
            read: Reads micro-batches from the iterator.
            has_next: Whether another step follows.

        Returns:
            The micro-batches, on the CPU; empty at the end of the data.
        """
        raw, laid_out = self._take_next(source, count)
        if laid_out is None:
            raw, _ = read(chain(raw, source), count)
            laid_out = self.lay_out(self._pairs_of(raw)) if raw else []
        if laid_out and has_next:
            self._read_next(source, count, read)
        return laid_out

    def lay_out(self, step: list[list[dict[str, Any]]]) -> list[Batch]:
        """Lays out the micro-batches of a step; safe to call in a background thread.

        Args:
            step: The pairs of each micro-batch.

        Returns:
            As many batches, pinned if the device is a GPU.
        """
        collator = self.collators["train"]
        if self.layout.balances:
            batches = collator.balance(step)
        else:
            batches = [collator(pairs) for pairs in step]
        pin = partial(pinned, device=self.device)
        return [each_tensor(batch, pin) for batch in batches]

    def count(self, batches: list[Batch]) -> torch.Tensor:
        """Counts the pairs and tokens of a step, on all ranks; one all-reduce.

        Returns:
            Shape (3,), int64: pairs, tokens of chosen answers, tokens of all sequences.
        """
        counts = [
            [pairs_in(batch), batch["chosen_tokens"], batch["num_tokens"]]
            for batch in batches
        ]
        return count_over_ranks(self._accelerator, torch.tensor(counts).sum(dim=0))

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """A context around training: at its end, drops the step that was read ahead."""
        try:
            yield
        finally:
            self.next_step = None

    # --- other batches ---------------------------------------------------------------

    def evaluation_batch(self, raw: RawBatch) -> Batch:
        """Lays out a micro-batch of an evaluation."""
        return self.collators["eval"](self._without_repeats(raw["examples"].pairs))

    def to_device(self, batch: Batch) -> Batch:
        """Copies the tensors of a batch to the device, asynchronously to a GPU."""
        return each_tensor(batch, partial(copied, device=self.device))

    # --- reading ahead ---------------------------------------------------------------

    def _take_next(
        self, source: Iterator, count: int
    ) -> tuple[list[RawBatch], list[Batch] | None]:
        """Takes the step that `_read_next` has read ahead.

        Args:
            source: The step's iterator. Each epoch has a new one.
            count: Micro-batches of the step. The last step of an epoch may have fewer.

        Returns:
            The micro-batches that were read, and their laid-out form. The latter is
            None if more micro-batches of the step have to be read first.
        """
        step, self.next_step = self.next_step, None
        if step is None or step.source() is not source:
            return [], None
        have = len(step.raw)
        is_whole = have == count or have < count and self._data_ended()
        return step.raw, step.laid_out.result() if is_whole else None

    def _read_next(self, source: Iterator, count: int, read: Read) -> None:
        """Reads the next step, and lays it out in the background.

        The main thread reads, at the same point on every rank: a data loader may call
        collectives.
        """
        raw, _ = read(self._until_data_end(source), count)
        if raw:
            work = partial(self.lay_out, self._pairs_of(raw))
            laid_out = in_background(work, "next-step")
            self.next_step = NextStep(weakref.ref(source), raw, laid_out)

    def _until_data_end(self, source: Iterator) -> Iterator[RawBatch]:
        """Yields the epoch's micro-batches, and stops right after the last one.

        One more `next` would end the data loader. accelerate would then treat the
        epoch as finished before its last micro-batch has run.
        """
        if self._data_ended():
            return
        for batch in source:
            yield batch
            if self._data_ended():
                return

    def _data_ended(self) -> bool:
        """Whether the epoch's last micro-batch was read; true without a data loader."""
        loader: Any = self._accelerator.gradient_state.active_dataloader
        return loader is None or loader.end_of_dataloader

    def _pairs_of(self, raw: list[RawBatch]) -> list[list[dict[str, Any]]]:
        """The pairs of each micro-batch; called right after the last one was read."""
        *others, last = [batch["examples"].pairs for batch in raw]
        return [*others, self._without_repeats(last)]

    def _without_repeats(self, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leaves out pairs that accelerate repeated in the epoch's last micro-batch.

        If the data end before every rank has a full micro-batch, accelerate adds pairs
        from the start of the data.
        """
        loader: Any = self._accelerator.gradient_state.active_dataloader
        ranks, rank = data_ranks(self._accelerator)
        repeats = ranks > 1 and self._accelerator.even_batches and not self._drops_last
        if not (repeats and loader.end_of_dataloader):
            return pairs
        rest = len(loader.dataset) % (ranks * len(pairs))
        before = rank * len(pairs)
        return pairs[: max(rest - before, 0)] if rest else pairs
