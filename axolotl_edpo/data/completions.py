"""The completion tokens of a batch, the positions that predict them, and sums.

A padded batch holds all chosen, then all rejected sequences. Only completion tokens are
scored. So only the positions that predict one go through the head:

    input_ids        p  p  p  c  c  c  _          prompt, completion, padding
    completion_mask  0  0  0  1  1  1  0
    scored position        ^  ^  ^                position t predicts token t + 1
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Completions(NamedTuple):
    """The scored tokens of a batch: of all chosen sequences, then of all rejected ones.

    Attributes:
        positions: Shape (tokens,), int64: the position that predicts each token, as an
            index into the flattened `input_ids`.
        targets: Shape (tokens,), int64: the token.
        lengths: Shape (sequences,), int64: number of scored tokens of each sequence.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor


def completions_of(batch: Mapping[str, Any]) -> Completions:
    """The completions of a `Batch`."""
    return Completions(*(batch[name] for name in Completions._fields))


def select_completions(
    input_ids: torch.Tensor, completion_mask: torch.Tensor
) -> Completions:
    """Positions, targets and lengths of the completions in a padded batch.

    A completion token in column 0 is left out, as no position predicts it.

    Args:
        input_ids: Shape (sequences, length).
        completion_mask: Shape (sequences, length), 1 on completion tokens.

    Returns:
        The scored tokens, row after row.
    """
    scored = completion_mask[:, 1:].bool()
    sequence, column = scored.nonzero(as_tuple=True)
    return Completions(
        positions=sequence * input_ids.shape[1] + column,
        targets=input_ids[:, 1:][scored],
        lengths=scored.sum(dim=1),
    )


def sum_per_sequence(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums a value per token over each sequence; an empty sequence gives 0.

    Tokens are added in order, so the result is the same in every run. A scatter-add on
    a GPU does not guarantee this.

    Args:
        values: Shape (tokens,), sequence after sequence.
        lengths: Shape (sequences,), tokens of each sequence. Their sum must be the
            length of `values`; this is not checked.

    Returns:
        Shape (sequences,).
    """
    if not len(lengths):
        return values
    # unsafe: skips the check of the lengths, which would wait for the GPU
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0, unsafe=True)


def chosen_minus_rejected(per_sequence: torch.Tensor) -> torch.Tensor:
    """The value of chosen minus that of rejected, per pair.

    Args:
        per_sequence: Shape (2 x pairs,), all chosen, then all rejected.

    Returns:
        Shape (pairs,).
    """
    chosen, rejected = per_sequence.chunk(2)
    return chosen - rejected
