"""`CachedRead`: reads a batch's hidden states from disk while another batch runs."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter

import torch

from ..background import copied, pinned
from .cache import ReferenceCache
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
    """Hidden states of a batch's scored tokens, read in the background.

    Args:
        cache: Cache that holds the pairs.
        pairs: Digests of the batch's pairs.
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
        device: torch.device,
        following: "CachedRead | None",
        stopwatch: Stopwatch,
    ):
        self._cache, self._pairs, self._device = cache, pairs, device
        self._following, self._stopwatch = following, stopwatch

    def start(self) -> None:
        """Starts the read, unless it has already started."""
        if self._future is None:
            self._future = self._reader.submit(self._read)

    def given(self, policy: torch.Tensor) -> torch.Tensor:
        """Waits for the hidden states, and starts the next batch's read.

        The measured time does not include the asynchronous copy to a GPU.

        Args:
            policy: The policy's hidden states, shape (tokens, hidden). They give the
                device and, for a batch without pairs, width and dtype.

        Returns:
            Shape (tokens, hidden): all chosen, then all rejected answers.

        Raises:
            ValueError: If a file was damaged since it was opened.
        """
        with self._stopwatch.running():
            self.start()
            hidden = self._future.result()  # type: ignore[union-attr]
            self._future = None
            if self._following is not None:
                self._following.start()
            if hidden is None:
                hidden = policy.detach()[:0]
            return copied(hidden, policy.device)

    def _read(self) -> torch.Tensor | None:
        both = [self._cache.read(pair) for pair in self._pairs]
        answers = [answer for side in zip(*both, strict=True) for answer in side]
        return pinned(torch.cat(answers), self._device) if answers else None
