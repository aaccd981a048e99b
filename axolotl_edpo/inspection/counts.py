"""The lines about a whole set: its pairs, what was noted of them, their lengths."""

from collections.abc import Iterator

import numpy as np

from ..data.columns import token_counts
from ..data.preparation import notes_in_words
from .pair_set import SAME, TRUNCATED, PairSet


def lines(found: PairSet) -> Iterator[str]:
    """A line for each kind of note, and the lengths of all pairs of a set."""
    name, total = f"`{found.key}`", len(found)
    yield f"{name}: {total} pairs{_left_out(found)}"
    yield from notes_in_words(found.key, found.pairs)
    same, cut = (int(found.flags(kind).sum()) for kind in (SAME, TRUNCATED))
    if same:
        yield f"{name}: {same} of {total} pairs have the same tokens in both answers."
    if cut:
        limit = f"`sequence_len: {found.max_length}`"
        yield f"{name}: {cut} of {total} pairs have an answer that {limit} truncates."
    yield from _table(found)


def _left_out(found: PairSet) -> str:
    if found.left_out is None:
        return "; rows that were left out are not counted, as the data are not here"
    if not found.left_out:
        return ""
    return f", and {found.left_out} rows left out: {found.reasons}"


def _table(found: PairSet) -> Iterator[str]:
    """Median and largest numbers of tokens."""
    prompt, chosen, rejected = token_counts(found.pairs)
    rows = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "sequence": prompt + np.maximum(chosen, rejected),
    }
    yield f"{'tokens':10}{'median':>8}{'longest':>9}"
    for name, tokens in rows.items():
        yield f"{name:10}{np.median(tokens):8.0f}{tokens.max():9}"
