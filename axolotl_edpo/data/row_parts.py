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
    length = batch["input_ids"].shape[1] // parts
    owners = batch["positions"] // length
    own = owners == part
    cut: Any = {**batch}
    for name in ALONG_THE_ROW:
        cut[name] = batch[name].split(length, dim=1)[part]  # type: ignore[literal-required]
    cut["positions"] = batch["positions"][own] - part * length
    cut["targets"] = batch["targets"][own]
    cut["part_sizes"] = tuple(torch.bincount(owners, minlength=parts).tolist())
    cut["places"] = owners.argsort(stable=True)
    return cut
