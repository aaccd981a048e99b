"""columns.py: columns are counted as rows would be."""

import pytest
from datasets import Dataset

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.data.columns import (
    IDS,
    has_chat_template,
    long_pairs,
    scored_lengths,
    token_rows,
)

PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
    {"prompt_ids": [4, 4, 4, 4], "chosen_ids": [6], "rejected_ids": [7, 8]},
]


def test_long_pairs_are_those_of_which_a_sequence_is_cut():
    data = Dataset.from_list(PAIRS)
    assert [long_pairs(data, n) for n in (6, 5, 4, 2, 1)] == [0, 1, 2, 2, 3]
    assert long_pairs(data.filter(lambda row: len(row["prompt_ids"]) < 4), 4) == 1


@pytest.mark.parametrize("max_length", [None, 5, 4])
def test_scored_lengths_are_those_of_a_batch(max_length):
    pairs = [*PAIRS, {"prompt_ids": [], "chosen_ids": [1, 2], "rejected_ids": [3]}]
    batch = PairCollator(pad_token_id=0, max_length=max_length)(pairs)
    expected = batch["lengths"].view(2, -1).sum(dim=0).tolist()
    assert scored_lengths(Dataset.from_list(pairs), max_length).tolist() == expected


def test_rows_of_tokens_come_in_the_order_of_the_data_set():
    pairs = PAIRS * 700  # of more than one table
    rows = token_rows(Dataset.from_list(pairs).select(range(1, len(pairs))))
    expected = [[pair[name] for name in IDS] for pair in pairs[1:]]
    assert [[part.tolist() for part in row] for row in rows] == expected


def test_types_of_chat_templates_are_told_by_their_name():
    types = ["chat_template.default", "chat_template", "llama3.ultra", None]
    found = [has_chat_template({"type": name}) for name in types]
    assert found == [True, True, False, False]
