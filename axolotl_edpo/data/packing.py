"""Packed rows: all sequences of a batch in one row, without padding.

The pairs follow each other. The prefix that chosen and rejected share can be in the row
once (p: prompt, c: chosen, r: rejected):

    row              p  p  p  c  c  c  r  r | p  p  c  r  r  r
    position         0  1  2  3  4  5  3  4 | 0  1  2  2  3  4

A token sees the earlier tokens of its sequence only: r sees p and r, but not c, and no
pair sees another. `Completions` hold the scored positions, as in a padded batch.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .layout import Batch
from .segments import Segments


class TokenSequence(NamedTuple):
    """A prompt with its completion.

    Attributes:
        ids: The tokens of the prompt, then of the completion.
        prompt_length: Number of tokens of the prompt.
    """

    ids: list[int]
    prompt_length: int

    @property
    def scored_from(self) -> int:
        """Index of the first completion token that a position predicts."""
        return max(self.prompt_length, 1)

    @property
    def scored(self) -> int:
        """Number of completion tokens that a position predicts."""
        return max(len(self.ids) - self.scored_from, 0)


class Pair(NamedTuple):
    """The two sequences of a preference pair.

    Attributes:
        chosen: The sequence with the chosen completion.
        rejected: The sequence with the rejected completion.
        shared: Length of the prefix that a packed row holds once for both.
    """

    chosen: TokenSequence
    rejected: TokenSequence
    shared: int

    @classmethod
    def from_sequences(
        cls, chosen: TokenSequence, rejected: TokenSequence, share: bool
    ) -> "Pair":
        """A pair from its sequences.

        Args:
            chosen: The sequence with the chosen completion.
            rejected: The sequence with the rejected completion.
            share: Whether a row holds their longest common prefix once.
        """
        shared = _common_prefix_length(chosen, rejected) if share else 0
        return cls(chosen, rejected, shared)

    @property
    def tokens(self) -> int:
        """Tokens that the pair takes in a packed row."""
        return len(self.chosen.ids) + len(self.rejected.ids) - self.shared


def _common_prefix_length(chosen: TokenSequence, rejected: TokenSequence) -> int:
    limit = min(len(chosen.ids), len(rejected.ids))
    # prompts are usually equal: one comparison is faster than a loop over tokens
    length = min(chosen.prompt_length, rejected.prompt_length, limit)
    if chosen.ids[:length] != rejected.ids[:length]:
        length = 0
    while length < limit and chosen.ids[length] == rejected.ids[length]:
        length += 1
    return length


def pairs_of(padded: Mapping[str, torch.Tensor], share: bool) -> list[Pair]:
    """The pairs of a padded batch.

    Args:
        padded: `input_ids`, `attention_mask` and `completion_mask`, each of shape
            (2 x pairs, length), padded on the right, all chosen, then all rejected. A
            completion is the end of its sequence.
        share: Whether a row holds the longest common prefix of a pair once.
    """
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    completions = padded["completion_mask"].sum(dim=1).tolist()
    rows = zip(padded["input_ids"].tolist(), lengths, completions, strict=True)
    sequences = [TokenSequence(ids[:n], n - completion) for ids, n, completion in rows]
    half = len(sequences) // 2
    both = zip(sequences[:half], sequences[half:], strict=True)
    return [Pair.from_sequences(chosen, rejected, share) for chosen, rejected in both]


class _Row:
    """A packed row to which pieces are appended. For segments, see `Segments`.

    Attributes:
        ids: The tokens of all pieces.
        positions: For each piece, the positions of its tokens in their sequence.
        copies: For each piece, the number of sequences that it belongs to.
        queries: For each segment, its number of queries.
        keys: For each segment, the indices of the pieces that it sees.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[np.ndarray] = []
        self.copies: list[int] = []
        self.queries: list[int] = []
        self.keys: list[tuple[int, ...]] = []

    @property
    def pieces(self) -> tuple[int, ...]:
        """Length of each piece."""
        return tuple(map(len, self.positions))

    def append(self, ids: list[int], position: int, copies: int) -> tuple[int, ...]:
        """Adds a piece, unless it is empty.

        Args:
            ids: Tokens of the piece.
            position: Position of its first token in the sequence.
            copies: Number of sequences that it belongs to.

        Returns:
            The index of the piece, as a tuple; for an empty piece an empty tuple.
        """
        if not ids:
            return ()
        self.ids += ids
        self.positions.append(np.arange(position, position + len(ids)))
        self.copies.append(copies)
        return (len(self.copies) - 1,)

    def end_segment(self, queries: int, keys: tuple[int, ...]) -> None:
        """Makes the last tokens of the row the queries of a new segment.

        Args:
            queries: Number of these tokens; with 0 there is no segment.
            keys: Indices of the pieces that the segment sees.
        """
        if queries:
            self.queries.append(queries)
            self.keys.append(keys)

    def append_pair(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """Adds the shared prefix, then the rest of chosen, then that of rejected.

        Returns:
            The indices in the row of the tokens of chosen, and of those of rejected.
        """
        chosen, rejected, shared = pair
        start = len(self.ids)
        prefix = self.append(chosen.ids[:shared], position=0, copies=2)
        rest = self.append(chosen.ids[shared:], position=shared, copies=1)
        # the queries of the prefix are in the segment of chosen
        self.end_segment(len(chosen.ids), prefix + rest)
        branch = len(self.ids)
        rest = self.append(rejected.ids[shared:], position=shared, copies=1)
        self.end_segment(len(rejected.ids) - shared, prefix + rest)
        places = np.arange(start, branch)
        return places, np.concatenate(
            [places[:shared], np.arange(branch, len(self.ids))]
        )

    def fill_up(self, multiple: int, pad_token_id: int) -> None:
        """Adds a segment of padding, so that the length is a multiple of `multiple`."""
        count = -len(self.ids) % multiple
        self.end_segment(count, self.append([pad_token_id] * count, 0, copies=0))


def pack(
    padded: Mapping[str, torch.Tensor],
    share: bool,
    pad_token_id: int = 0,
    multiple: int | None = None,
) -> Batch:
    """Packs the pairs of a padded batch; see `pairs_of` and `pack_pairs`."""
    return pack_pairs(pairs_of(padded, share), pad_token_id, multiple)


def pack_pairs(
    pairs: Sequence[Pair], pad_token_id: int = 0, multiple: int | None = None
) -> Batch:
    """Packs the sequences of pairs into one row.

    Args:
        pairs: At least one pair.
        pad_token_id: The token that fills the end of the row, in a separate segment.
        multiple: The length of the row is filled up to a multiple of it; None: it is
            not filled up.

    Returns:
        The inputs of the model, `copies`, and the fields of `Completions`.
    """
    row = _Row()
    chosen, rejected = zip(*map(row.append_pair, pairs), strict=True)
    row.fill_up(multiple or 1, pad_token_id)
    sequences = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    ids, pieces = np.array(row.ids, dtype=np.int64), row.pieces
    both = [*zip(sequences, [*chosen, *rejected], strict=True)]
    before = [places[sequence.scored_from - 1 : -1] for sequence, places in both]
    scored = [places[sequence.scored_from :] for sequence, places in both]
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "attention_mask": no_mask(),
        "position_ids": torch.from_numpy(np.concatenate(row.positions))[None],
        "segments": Segments(pieces, tuple(row.queries), tuple(row.keys)),
        "copies": torch.from_numpy(np.repeat(row.copies, pieces))[None],
        "positions": torch.from_numpy(np.concatenate(before)),
        "targets": torch.from_numpy(ids[np.concatenate(scored)]),
        "lengths": torch.tensor([sequence.scored for sequence in sequences]),
    }


def no_mask() -> torch.Tensor:
    """An empty mask of shape (1, 1, 0, 0). A packed row uses `segments` instead.

    Without a mask, transformers computes a causal mask, which needs the square of the
    row's length. It does not change a mask of four dimensions. An attention that uses
    this mask by mistake fails, because the shape does not fit.
    """
    return torch.empty(1, 1, 0, 0)


def balance_by_tokens(sizes: list[int], bins: int) -> list[list[int]]:
    """Distributes items over bins, so that all bins have about the same total.

    Greedy: from the largest item to the smallest, each goes to the smallest bin.

    Args:
        sizes: Tokens of each item, above 0.
        bins: Number of bins. A bin is empty only if there are fewer items than bins.

    Returns:
        For each bin the indices of its items, ascending.
    """
    heap = [(0, b) for b in range(bins)]
    balanced: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, smallest = heapq.heappop(heap)
        balanced[smallest].append(item)
        heapq.heappush(heap, (total + sizes[item], smallest))
    return [sorted(items) for items in balanced]
