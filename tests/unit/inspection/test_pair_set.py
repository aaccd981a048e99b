"""pair_set.py: pairs are found by their notes, whole sets at once."""

import pytest
from datasets import Dataset
from helpers import tiny

from axolotl_edpo.data.pair_maker import LEFT_OUT, MERGED, NOTES, REPEATED, TEMPLATE
from axolotl_edpo.inspection import command
from axolotl_edpo.inspection.pair_set import SAME, TRUNCATED, PairSet

# Notes, and tokens of prompt, chosen and rejected.
ROWS = [
    ("", [3, 4], [5, 1], [6, 1]),
    ("merged: ' '", [3, 4], [5, 1], [5, 1]),
    ("template: 'a' instead of 'b'\nleft out: `tools`", [3], [5], [6, 7, 8, 1]),
    ("template: merged: no kind", [3, 3, 3], [5, 1], [6, 1]),
    ("", [3], [7, 1], [7, 1]),
    ("", [3], [7, 1], [8, 1]),
]
COLUMNS = (NOTES, "prompt_ids", "chosen_ids", "rejected_ids")


def pair_set(times: int) -> PairSet:
    """These rows, so many times, with `sequence_len: 4`."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS * times]
    data = Dataset.from_list(rows)
    return PairSet("datasets", data, 0, "", tiny.reference_tokenizer(), 4)


@pytest.mark.parametrize("times", [1, 200])  # of more than one Arrow table
@pytest.mark.parametrize(
    ("note", "rows"),
    [
        (MERGED, [1]),
        (TEMPLATE, [2, 3]),
        (LEFT_OUT, [2]),
        (TRUNCATED, [2, 3]),
        (SAME, [1, 4]),
        ("any", [1, 2, 3, 4]),
    ],
)
def test_pairs_are_found_by_their_notes(note, rows, times):
    expected = [row in rows for row in range(len(ROWS))] * times
    assert pair_set(times).flags(note).tolist() == expected


def test_the_command_knows_every_kind_of_note():
    kinds = ("any", TEMPLATE, MERGED, REPEATED, LEFT_OUT, TRUNCATED, SAME)
    assert command.NOTES == kinds
