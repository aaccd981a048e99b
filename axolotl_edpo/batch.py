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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


def shared_starts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """How many tokens chosen and rejected have in common at their start.

    Args:
        input_ids: Shape (2 x pairs, length), padded on the right.
        attention_mask: Shape (2 x pairs, length).

    Returns:
        Shape (pairs,).
    """
    (chosen, rejected), real = input_ids.chunk(2), attention_mask.bool().chunk(2)
    return ((chosen == rejected) & real[0] & real[1]).cumprod(dim=1).sum(dim=1)


class _Row:
    """A packed row while it is written."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.pieces: list[int] = []
        self.queries: list[int] = []
        self.keys: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return sum(self.pieces)

    def write(
        self, tokens: torch.Tensor, start: int, sees: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Appends a piece.

        Args:
            tokens: Shape (length,); an empty piece is none.
            start: Position of its first token.
            sees: Pieces before it that it continues.

        Returns:
            Where in the row its tokens are, and the pieces up to it.
        """
        where = torch.arange(len(self), len(self) + len(tokens))
        if not len(tokens):
            return where, sees
        self.tokens.append(tokens)
        self.positions.append(torch.arange(start, start + len(tokens)))
        self.pieces.append(len(tokens))
        return where, (*sees, len(self.pieces) - 1)

    def close(self, queries: int, keys: tuple[int, ...]) -> None:
        """Ends a segment: the last `queries` tokens see these pieces."""
        if queries:
            self.queries.append(queries)
            self.keys.append(keys)


def pack(
    padded: Mapping[str, torch.Tensor],
    share: bool,
    pad_token_id: int = 0,
    multiple: int | None = None,
) -> dict[str, Any]:
    """One row that holds every sequence of a padded batch.

    Args:
        padded: `input_ids`, `attention_mask` and `completion_mask`, each of shape
            (2 x pairs, length), padded on the right, all chosen, then all rejected.
        share: Whether what a pair has in common at its start is there once.
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
    ids, completion = padded["input_ids"], padded["completion_mask"].bool()
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    pairs = len(lengths) // 2
    starts = [0] * pairs
    if share:
        starts = shared_starts(ids, padded["attention_mask"]).tolist()
    row, paths = _Row(), [torch.empty(0)] * (2 * pairs)
    for pair, start in enumerate(starts):
        trunk, seen = row.write(ids[pair, :start], 0)
        for sequence in (pair, pairs + pair):
            own = ids[sequence, start : lengths[sequence]]
            where, keys = row.write(own, start, seen)
            # the first branch asks for the trunk too
            asked = len(own) + (start if sequence == pair else 0)
            row.close(asked, keys)
            paths[sequence] = torch.cat([trunk, where])
    filling = -len(row) % (multiple or 1)
    row.close(filling, row.write(ids.new_full((filling,), pad_token_id), 0)[1])
    scored = [completion[i, 1:n] for i, n in enumerate(lengths)]
    return {
        "input_ids": torch.cat(row.tokens)[None],
        "position_ids": torch.cat(row.positions)[None],
        "copies": torch.bincount(torch.cat(paths).long(), minlength=len(row))[None],
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan),
        "segments": Segments(tuple(row.pieces), tuple(row.queries), tuple(row.keys)),
        "positions": torch.cat([p[:-1][s] for p, s in zip(paths, scored, strict=True)]),
        "targets": torch.cat([ids[i, 1:][: len(s)][s] for i, s in enumerate(scored)]),
        "lengths": torch.stack([s.sum() for s in scored]),
    }


def deal(sizes: Sequence[int], bins: int) -> list[list[int]]:
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
