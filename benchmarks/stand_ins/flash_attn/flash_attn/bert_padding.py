"""From padded rows to sequences that follow each other, and back."""

import torch
import torch.nn.functional as F


def unpad_input(hidden: torch.Tensor, mask: torch.Tensor) -> tuple:
    """What the mask leaves.

    Args:
        hidden: Shape (batch, length, ...).
        mask: Shape (batch, length), 1 where there is a token.

    Returns:
        Tokens of shape (tokens, ...), where they were in the flattened grid, where each
        sequence begins, the longest one's length, and all lengths.
    """
    lengths = mask.sum(-1, dtype=torch.int32)
    where = mask.flatten().nonzero().flatten()
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[where], where, starts, lengths.max().item(), lengths


def pad_input(
    hidden: torch.Tensor, where: torch.Tensor, batch: int, length: int
) -> torch.Tensor:
    """Tokens of shape (tokens, ...) in a grid of (batch, length, ...), 0 elsewhere."""
    out = hidden.new_zeros(batch * length, *hidden.shape[1:])
    return out.index_put((where,), hidden).unflatten(0, (batch, length))
