"""From pairs to the rows a model runs on, and the completion tokens in them.

A padded batch holds all chosen, then all rejected sequences. Only completion tokens
are scored, so only the positions that predict one go through the head:

    input_ids        p  p  p  c  c  c  _          prompt, completion, padding
    completion_mask  0  0  0  1  1  1  0
    scored position        ^  ^  ^                position t predicts token t + 1

A packed batch holds the same sequences in one row, pair after pair, without padding.
What chosen and rejected have in common at their start can be in it once:

    row              p  p  p  c  c  c  r  r | p  p  c  r  r  r
    position         0  1  2  3  4  5  3  4 | 0  1  2  2  3  4
    sees             prompt and itself; r never sees c, nor a pair another

Both say with `Completions` which positions are scored: everything after it is the same.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

# The entries of a batch that are a model's inputs.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "segments")


class Completions(NamedTuple):
    """The completion tokens of a batch, sequence after sequence: chosen, then rejected.

    Attributes:
        positions: Shape (tokens,), index into the flattened (rows x length) grid of the
            position that predicts the token.
        targets: Shape (tokens,), the predicted token.
        lengths: Shape (sequences,), completion tokens of each sequence.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor


class Cache:
    """What is made once per batch.

    Neither a dict nor a data class: of those, FSDP2 hands every layer a copy.
    """

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}


@dataclass(frozen=True)
class Segments:
    """What the tokens of a packed row may see.

    A segment is a run of queries and the pieces of the row whose keys they see: all
    keys of the pieces before their own, and causally those of their own run. Positions
    run on from piece to piece.

    Attributes:
        pieces: Lengths of the pieces of the row; their sum is the row's length.
        queries: Queries of each segment; the runs follow each other in the row.
        keys: Per segment the indices of the pieces it sees, in order of position.
        cache: Masks and boundaries, made once per batch by the attention.
    """

    pieces: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]
    cache: Cache = field(default_factory=Cache, compare=False, repr=False)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys of each segment, at least as many as its queries."""
        return tuple(sum(self.pieces[i] for i in keys) for keys in self.keys)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, called at most once per batch and key."""
        made = self.cache.made
        if key not in made:
            made[key] = make()
        return made[key]


def completions_of(batch: Mapping[str, Any]) -> Completions:
    """The completions that a batch was made with."""
    return Completions(*(batch[name] for name in Completions._fields))


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a model's forward takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def each_tensor(
    batch: Mapping[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """A batch in which every tensor was handed to a function."""
    return {
        name: change(value) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def select_completions(
    input_ids: torch.Tensor, completion_mask: torch.Tensor
) -> Completions:
    """Positions, targets and lengths of the completions in a padded batch.

    A completion token in column 0 has no position that predicts it and is left out.

    Args:
        input_ids: Shape (sequences, length).
        completion_mask: Shape (sequences, length), 1 on completion tokens.

    Returns:
        The selection, in reading order, so tokens of a sequence are adjacent.
    """
    scored = completion_mask[:, 1:].bool()
    sequence, column = scored.nonzero(as_tuple=True)
    return Completions(
        positions=sequence * input_ids.shape[1] + column,
        targets=input_ids[:, 1:][scored],
        lengths=scored.sum(dim=1),
    )


class TokenSequence(NamedTuple):
    """Prompt and completion, before they are in a row.

    Attributes:
        ids: The tokens.
        prompt: How many of them come before the completion.
    """

    ids: list[int]
    prompt: int

    @property
    def scored_from(self) -> int:
        """The first token of the completion that a position predicts."""
        return max(self.prompt, 1)

    @property
    def scored(self) -> int:
        """Tokens of the completion that a position predicts."""
        return max(len(self.ids) - self.scored_from, 0)


class Pair(NamedTuple):
    """Two sequences.

    Attributes:
        chosen: Of the answer that is better.
        rejected: Of the other.
        shared: How many tokens at their start are in the row once.
    """

    chosen: TokenSequence
    rejected: TokenSequence
    shared: int

    @classmethod
    def of(cls, chosen: TokenSequence, rejected: TokenSequence, share: bool) -> "Pair":
        """A pair that shares all that its sequences have in common at their start."""
        return cls(chosen, rejected, _common_start(chosen, rejected) if share else 0)

    @property
    def tokens(self) -> int:
        """Tokens in a packed row."""
        return len(self.chosen.ids) + len(self.rejected.ids) - self.shared


def _common_start(chosen: TokenSequence, rejected: TokenSequence) -> int:
    """How many tokens two sequences have in common at their start."""
    shorter = min(len(chosen.ids), len(rejected.ids))
    same = min(chosen.prompt, rejected.prompt, shorter)
    if chosen.ids[:same] != rejected.ids[:same]:
        same = 0
    while same < shorter and chosen.ids[same] == rejected.ids[same]:
        same += 1
    return same


def pairs_of(padded: Mapping[str, torch.Tensor], share: bool) -> list[Pair]:
    """The pairs of a padded batch.

    Args:
        padded: `input_ids`, `attention_mask` and `completion_mask`, each of shape
            (2 x pairs, length), padded on the right, all chosen, then all rejected. A
            completion is the end of its sequence.
        share: Whether what a pair has in common at its start is to be in its row once.
    """
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    completions = padded["completion_mask"].sum(dim=1).tolist()
    rows = zip(padded["input_ids"].tolist(), lengths, completions, strict=True)
    every = [TokenSequence(ids[:n], n - completion) for ids, n, completion in rows]
    half = len(every) // 2
    both = zip(every[:half], every[half:], strict=True)
    return [Pair.of(chosen, rejected, share) for chosen, rejected in both]


class _Path(NamedTuple):
    """Where in a row a sequence is.

    Attributes:
        sequence: Its tokens.
        shared: How many of them, from its start, are not where the rest is.
        first: Where token 0 is.
        rest: Where token 0 would be, if all tokens were where the rest is.
    """

    sequence: TokenSequence
    shared: int
    first: int
    rest: int

    def runs(self, token: int, count: int) -> list[tuple[int, int]]:
        """Where tokens of the sequence are that follow each other.

        Returns:
            The place of the first, and how many, of those that are shared and of the
            others.
        """
        shared = min(max(self.shared - token, 0), count)
        return [
            (self.first + token, shared),
            (self.rest + token + shared, count - shared),
        ]


class _Row:
    """A packed row while it is written.

    Attributes:
        tokens: Of all pieces.
        pieces: Length of each piece.
        starts: Position of the first token of each piece.
        copies: How many sequences each piece belongs to.
        queries: Of each segment.
        keys: Pieces that each segment sees.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.pieces: list[int] = []
        self.starts: list[int] = []
        self.copies: list[int] = []
        self.queries: list[int] = []
        self.keys: list[tuple[int, ...]] = []

    def write(
        self, tokens: list[int], start: int, copies: int, sees: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """Appends a piece.

        Args:
            tokens: Of the piece; an empty one is none.
            start: Position of its first token.
            copies: How many sequences it belongs to.
            sees: Pieces before it that it continues.

        Returns:
            The pieces up to it.
        """
        if not tokens:
            return sees
        self.tokens += tokens
        self.pieces.append(len(tokens))
        self.starts.append(start)
        self.copies.append(copies)
        return (*sees, len(self.pieces) - 1)

    def close(self, queries: int, keys: tuple[int, ...]) -> None:
        """Ends a segment: the last `queries` tokens see these pieces."""
        if queries:
            self.queries.append(queries)
            self.keys.append(keys)

    def write_pair(self, pair: Pair) -> tuple[_Path, _Path]:
        """Appends what both share, then the rest of chosen, then that of rejected."""
        chosen, rejected, shared = pair
        first = len(self.tokens)
        seen = self.write(chosen.ids[:shared], 0, copies=2)
        keys = self.write(chosen.ids[shared:], shared, copies=1, sees=seen)
        self.close(len(chosen.ids), keys)  # the first asks for what is shared too
        rest = len(self.tokens) - shared
        keys = self.write(rejected.ids[shared:], shared, copies=1, sees=seen)
        self.close(len(rejected.ids) - shared, keys)
        return (
            _Path(chosen, shared, first, first),
            _Path(rejected, shared, first, rest),
        )


def pack(
    padded: Mapping[str, torch.Tensor],
    share: bool,
    pad_token_id: int = 0,
    multiple: int | None = None,
) -> dict[str, Any]:
    """As `pack_pairs`, of the pairs of a padded batch; see `pairs_of`."""
    return pack_pairs(pairs_of(padded, share), pad_token_id, multiple)


def pack_pairs(
    pairs: Iterable[Pair], pad_token_id: int = 0, multiple: int | None = None
) -> dict[str, Any]:
    """One row that holds every sequence of some pairs.

    Args:
        pairs: At least one.
        pad_token_id: Fills the row's end, as a segment of its own, where `multiple`
            asks for it.
        multiple: The row's length becomes a multiple of it.

    Returns:
        `input_ids`, `position_ids` and `copies` (how many sequences a token stands
        for), each of shape (1, length), `segments`, and the fields of `Completions`. A
        causal mask would be of shape (1, 1, length, length):
        `attention_mask` is a place holder that keeps transformers from making one, and
        not a number for whoever would read it.
    """
    row = _Row()
    chosen, rejected = zip(*map(row.write_pair, pairs), strict=True)
    filling = -len(row.tokens) % (multiple or 1)
    row.close(filling, row.write([pad_token_id] * filling, 0, copies=0))
    tokens = np.array(row.tokens, dtype=np.int64)
    paths = [*chosen, *rejected]
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "position_ids": torch.from_numpy(_ranges(row.starts, row.pieces))[None],
        "copies": torch.from_numpy(np.repeat(row.copies, row.pieces))[None],
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan),
        "segments": Segments(tuple(row.pieces), tuple(row.queries), tuple(row.keys)),
        "positions": torch.from_numpy(_places(paths, before=1)),
        "targets": torch.from_numpy(tokens[_places(paths, before=0)]),
        "lengths": torch.tensor([path.sequence.scored for path in paths]),
    }


def _places(paths: list[_Path], before: int) -> np.ndarray:
    """Where in the row the scored tokens of sequences are, or the tokens before them.

    Args:
        paths: Of the sequences.
        before: How many tokens before each.

    Returns:
        Shape (tokens,), sequence after sequence.
    """
    runs = [
        run
        for path in paths
        for run in path.runs(path.sequence.scored_from - before, path.sequence.scored)
    ]
    return _ranges([first for first, _ in runs], [count for _, count in runs])


def _ranges(firsts: list[int], counts: list[int]) -> np.ndarray:
    """So many numbers that follow each other from each of these on; int64."""
    lengths = np.array(counts, dtype=np.int64)
    before = np.array(firsts, dtype=np.int64) - (lengths.cumsum() - lengths)
    return np.arange(lengths.sum()) + np.repeat(before, lengths)


def deal(sizes: list[int], bins: int) -> list[list[int]]:
    """Items over bins, so that the fullest bin is about as small as it can be.

    The longest first, each to the emptiest bin.

    Args:
        sizes: Size of each item, above 0.
        bins: Number of bins; one is empty only if there are fewer items than bins.

    Returns:
        The items of each bin, in their own order.
    """
    heap = [(0, b) for b in range(bins)]
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, emptiest = heapq.heappop(heap)
        dealt[emptiest].append(item)
        heapq.heappush(heap, (total + sizes[item], emptiest))
    return [sorted(items) for items in dealt]


def sum_per_sequence(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums a per-token value over each sequence; an empty sequence gives 0.

    Args:
        values: Shape (tokens,), sequence after sequence.
        lengths: Shape (sequences,), sums to tokens.

    Returns:
        Shape (sequences,). Segments are summed in order, so the result is the same
        in every run, which scatter-adds on a GPU do not promise.
    """
    if not len(lengths):
        return values
    # unsafe: does not wait for the GPU to compare the lengths with the tokens
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0, unsafe=True)


def chosen_minus_rejected(per_sequence: torch.Tensor) -> torch.Tensor:
    """Difference within each pair.

    Args:
        per_sequence: Shape (2 x pairs,), all chosen, then all rejected.

    Returns:
        Shape (pairs,).
    """
    chosen, rejected = per_sequence.chunk(2)
    return chosen - rejected
