"""From a batch of 2P sequences to its completion tokens.

A batch holds all chosen, then all rejected sequences. Only completion tokens are
scored, so only the positions that predict one go through the head:

    input_ids        p  p  p  c  c  c  _          prompt, completion, padding
    completion_mask  0  0  0  1  1  1  0
    scored position        ^  ^  ^                position t predicts token t + 1
"""

from typing import NamedTuple

import torch


class Completions(NamedTuple):
    """The completion tokens of a batch, sequence after sequence.

    Attributes:
        positions: Shape (tokens,), index into the flattened (sequences x length)
            grid of the position that predicts the token.
        targets: Shape (tokens,), the predicted token.
        lengths: Shape (sequences,), completion tokens of each sequence.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor


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


def sum_per_sequence(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums a per-token value over each sequence; an empty sequence gives 0.

    Args:
        values: Shape (tokens,), sequence after sequence.
        lengths: Shape (sequences,), sums to tokens.

    Returns:
        Shape (sequences,). Segments are summed in order, so the result is the same
        in every run, which scatter-adds on a GPU do not promise.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0)


def chosen_minus_rejected(per_sequence: torch.Tensor) -> torch.Tensor:
    """Difference within each pair.

    Args:
        per_sequence: Shape (2 x pairs,), all chosen, then all rejected.

    Returns:
        Shape (pairs,).
    """
    chosen, rejected = per_sequence.chunk(2)
    return chosen - rejected
