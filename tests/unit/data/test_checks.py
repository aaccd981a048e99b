"""checks.py: pairs without an answer, of two equal answers, or too long are counted."""

import random

import pytest
from datasets import Dataset

from axolotl_edpo.data.checks import check_prepared, check_tokens

PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
    {"prompt_ids": [4, 4, 4, 4], "chosen_ids": [6], "rejected_ids": [7, 8]},
]


def pairs(count: int, empty: int = 0) -> list[dict]:
    """More than one piece of a table; answers of up to three of two tokens."""
    rng = random.Random(0)

    def answer() -> list[int]:
        return rng.choices([3, 4], k=rng.randint(1, 3))

    rows = [
        {"prompt_ids": [5], "chosen_ids": answer(), "rejected_ids": answer()}
        for _ in range(count)
    ]
    for row in rng.sample(rows, empty):
        row["rejected_ids"] = []
    return rows


def test_pairs_of_one_answer_are_counted(caplog):
    rows = pairs(2500)
    same = sum(row["chosen_ids"] == row["rejected_ids"] for row in rows)
    check_tokens("train", Dataset.from_list(rows))
    assert 0 < same < 2500 and f"the same in {same} of 2500 pairs" in caplog.text
    caplog.clear()
    check_tokens("train", Dataset.from_list(PAIRS))
    assert not caplog.records


def test_pairs_without_an_answer_are_counted():
    with pytest.raises(ValueError, match="eval set: 7 of 2500 pairs have an answer"):
        check_tokens("eval", Dataset.from_list(pairs(2500, empty=7)))


def test_no_pairs_are_refused():
    nothing = Dataset.from_list(PAIRS).select([])
    with pytest.raises(ValueError, match="train set: no pair is left"):
        check_tokens("train", nothing)


@pytest.mark.parametrize(
    ("before", "max_length", "said"),
    [
        (3, 6, None),
        (3, 5, "5`: 0 of 3 pairs dropped (the prompt alone fills it), 1 truncated"),
        (5, 6, "6`: 2 of 5 pairs dropped (the prompt alone fills it), 0 truncated"),
        (5, 4, "4`: 2 of 5 pairs dropped (the prompt alone fills it), 2 truncated"),
        (5, None, None),
    ],
    ids=["neither", "truncated", "dropped", "both", "no limit"],
)
def test_pairs_that_sequence_len_drops_or_cuts_are_counted(
    before, max_length, said, caplog
):
    """Three are left; their longest sequences have 5, 2 and 6 tokens."""
    texts = Dataset.from_list([{"prompt": "a"}] * before)
    check_prepared("train", texts, Dataset.from_list(PAIRS), max_length)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (said is not None)
    assert all(f"train set, `sequence_len: {said}" in line for line in messages)
