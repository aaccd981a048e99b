"""`CachedRead`: reads from disk what is kept of a batch while another batch runs."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter

import torch

from ..background import copied, pinned
from ..data.collator import Examples
from ..data.layout import Batch
from ..data.pair_id import pair_digest
from ..distributed import RowGroup
from ..models.split_row import own_places
from .cache import ReferenceCache
from .cacheable import require_in_cache
from .states import ReferenceStates


class Stopwatch:
    """Measures time.

    Attributes:
        seconds: Total of all measured times.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context whose duration is added to `seconds`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start


class CachedRead(ReferenceStates):
    """What is kept of a batch's pairs, read in the background.

    Args:
        cache: Cache that holds the pairs.
        pairs: Digests of the batch's pairs.
        rows: Index, among all their values, of those that this rank needs.
        device: The run's device. For a GPU, memory is pinned.
        following: The read of the next batch. It starts when `given` returns this one,
            so that at most two batches are in memory.
        stopwatch: Measures how long batches wait for the disk.
    """

    _reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference-cache")
    _future: Future | None = None

    def __init__(
        self,
        cache: ReferenceCache,
        pairs: list[bytes],
        rows: torch.Tensor | slice,
        device: torch.device,
        following: "CachedRead | None",
        stopwatch: Stopwatch,
    ):
        self._cache, self._pairs, self._rows = cache, pairs, rows
        self._device, self._following, self._stopwatch = device, following, stopwatch

    def start(self) -> None:
        """Starts the read, unless it has already started."""
        if self._future is None:
            self._future = self._reader.submit(self._read)

    def given(self, policy: torch.Tensor) -> torch.Tensor:
        """Waits for the read, and starts the next batch's.

        The measured time does not include the asynchronous copy to a GPU.

        Args:
            policy: Hidden states or log-probabilities of the policy. They give the
                device and, for a batch without pairs, width and dtype.

        Returns:
            Hidden states, shape (tokens, hidden), or log-probabilities, shape (2 x
            pairs,): of all chosen, then of all rejected answers. Of these, `rows`.

        Raises:
            ValueError: If a file was damaged since it was opened.
        """
        with self._stopwatch.running():
            self.start()
            kept = self._future.result()  # type: ignore[union-attr]
            self._future = None
            if self._following is not None:
                self._following.start()
            if kept is None:
                kept = policy.detach()[:0]
            return copied(kept, policy.device)

    def _read(self) -> torch.Tensor | None:
        both = [self._cache.read(pair) for pair in self._pairs]
        answers = [answer for side in zip(*both, strict=True) for answer in side]
        if not answers:
            return None
        # all of a pair is read, because its checksum is of all
        return pinned(torch.cat(answers)[self._rows], self._device)


def reads_of(
    cache: ReferenceCache,
    batches: Sequence[Batch],
    device: torch.device,
    stopwatch: Stopwatch,
    group: RowGroup,
) -> dict[Examples, CachedRead]:
    """A read for each batch; each starts the next one when it is done.

    Args:
        cache: Cache that holds the pairs.
        batches: Batches on the CPU.
        device: The run's device.
        stopwatch: Measures how long batches wait for the disk.
        group: The ranks among which the values of a batch are divided.

    Raises:
        ValueError: If a pair is not in the cache, or has other lengths there.
    """
    reads: dict[Examples, CachedRead] = {}
    following = None
    for batch in reversed(batches):
        pairs = [pair_digest(pair) for pair in batch["examples"].pairs]
        require_in_cache(cache, pairs, batch["lengths"])
        rows = slice(None) if group.size == 1 else own_places(batch, group)
        following = CachedRead(cache, pairs, rows, device, following, stopwatch)
        reads[batch["examples"]] = following
    return dict(reversed(reads.items()))
