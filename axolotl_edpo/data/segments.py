"""`Segments`: which keys each query of a packed row sees."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Cache:
    """What the attention computes for one layer and uses again in the others.

    It is neither a dict nor a data class, because FSDP2 gives every layer a copy of
    those.

    Attributes:
        entries: Masks and boundaries of this batch.
        windows: The sliding windows of the layers that have run; None: no window.
    """

    def __init__(self) -> None:
        self.entries: dict[Any, Any] = {}
        self.windows: set[int | None] = set()


@dataclass(frozen=True)
class Segments:
    """Which keys each query of a packed row sees.

    The row is divided twice: into pieces, for the keys, and into segments, for the
    queries. A segment sees some of the pieces. Its queries are the last tokens of these
    pieces. Within them the attention is causal.

    Attributes:
        pieces: Length of each piece. Their sum is the length of the row.
        queries: Number of queries of each segment, in the order of the row.
        keys: For each segment the indices of its pieces, in order of position.
        cache: What the layers share.
    """

    pieces: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]
    cache: Cache = field(default_factory=Cache, compare=False, repr=False)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Number of keys of each segment, at least as many as its queries."""
        return tuple(sum(self.pieces[i] for i in keys) for keys in self.keys)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which is called once per batch and key.

        Args:
            key: Identifies the result; hashable.
            compute: Computes the result.
        """
        entries = self.cache.entries
        if key not in entries:
            entries[key] = compute()
        return entries[key]

    def clear_cache(self) -> None:
        """Frees the masks and boundaries of this batch."""
        self.cache.entries.clear()
