"""The part of a packed row that a rank has under context parallelism.

A row is cut into contiguous parts of equal length, one per rank of a group:

    row             p  p  p  c │ c  c  r  r
    scored                ^  ^ │ ^     ^  ^
    rank            0          │ 1

A rank scores the tokens that positions of its part predict, even if the token itself is
in the next part. Everything per pair stays whole on every rank.
"""

from typing import Any

import torch

from .layout import Batch

# Entries of shape (1, length).
ALONG_THE_ROW = ("input_ids", "position_ids", "copies")


def part_of_row(batch: Batch, parts: int, part: int) -> Batch:
    """Cuts a packed batch.

    Args:
        batch: A packed batch, whose length is a multiple of `parts`.
        parts: Number of parts.
        part: Index of the part to keep.

    Returns:
        The batch with the inputs, positions and targets of this part. It also has
        `part_sizes`, the scored tokens of each part, and `places`, see `Batch`.
    """
    entries: dict[str, Any] = {**batch}
    length = batch["input_ids"].shape[1] // parts
    start = part * length
    owners = batch["positions"] // length
    own = owners == part
    for name in ALONG_THE_ROW:
        entries[name] = entries[name][:, start : start + length]
    sizes = torch.bincount(owners, minlength=parts).tolist()
    return {
        **entries,
        "positions": batch["positions"][own] - start,
        "targets": batch["targets"][own],
        "part_sizes": tuple(sizes),
        "places": owners.argsort(stable=True),
    }  # type: ignore[typeddict-item]
