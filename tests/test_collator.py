"""collator.py on three pairs."""

import pytest

from axolotl_edpo.batch import Segments, completions_of
from axolotl_edpo.collator import PairCollator, pairs_in

PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
    {"prompt_ids": [4, 4, 4, 4], "chosen_ids": [6], "rejected_ids": [7, 8]},
]


def test_a_padded_batch_says_which_positions_are_scored():
    batch = PairCollator(pad_token_id=0)(PAIRS[:2])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 5)
    assert batch["positions"].tolist() == [1, 2, 3, 5, 11, 15]
    assert batch["targets"].tolist() == [7, 8, 9, 6, 10, 7]
    assert batch["lengths"].tolist() == [3, 1, 1, 1]
    assert batch["num_tokens"] == 5 + 2 + 3 + 2
    assert "completion_mask" not in batch and pairs_in(batch) == 2


def test_tokens_are_counted_alike_padded_packed_and_shared():
    plain = PairCollator(pad_token_id=0)
    packed = PairCollator(pad_token_id=0, packs=True)
    shared = PairCollator(pad_token_id=0, packs=True, shares=True)
    counts = [collator(PAIRS)["num_tokens"] for collator in (plain, packed, shared)]
    assert counts == [23, 23, 23]
    assert packed(PAIRS)["input_ids"].numel() == 23
    assert shared(PAIRS)["input_ids"].numel() == 23 - 2 - 1 - 4


def test_truncation_is_that_of_trl_in_every_layout():
    for packs, shares in ((False, False), (True, False), (True, True)):
        collator = PairCollator(
            pad_token_id=0, max_length=4, packs=packs, shares=shares
        )
        batch = collator([PAIRS[0]])
        assert batch["targets"].tolist() == [7, 8, 10]
        assert batch["lengths"].tolist() == [2, 1]


def test_a_start_cut_off_differently_is_not_shared():
    collator = PairCollator(
        pad_token_id=0,
        max_length=3,
        truncation_mode="keep_end",
        packs=True,
        shares=True,
    )
    batch = collator([PAIRS[2]])  # 4 4 6 and 4 7 8
    assert batch["input_ids"].tolist() == [[4, 4, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1, 2]]
    assert batch["segments"] == Segments((1, 2, 2), (3, 2), ((0, 1), (0, 2)))


def test_dealing_keeps_every_pair_and_spreads_the_tokens():
    collator = PairCollator(pad_token_id=0, packs=True, shares=True)
    batches = collator.deal([PAIRS[:2], PAIRS[2:]])
    # rows of 6, 3 and 7 tokens: 7 against 6 + 3
    assert [batch["input_ids"].numel() for batch in batches] == [7, 9]
    assert [pairs_in(batch) for batch in batches] == [1, 2]
    assert sum(batch["num_tokens"] for batch in batches) == 23
    assert batches[0]["input_ids"].tolist() == [[4, 4, 4, 4, 6, 7, 8]]


@pytest.mark.parametrize("packs", [False, True])
def test_without_pairs_there_is_a_row_that_scores_nothing(packs):
    collator = PairCollator(pad_token_id=0, packs=packs, shares=packs)
    blank = collator([])
    assert blank["input_ids"].numel() > 0
    assert completions_of(blank).positions.shape == (0,)
    assert pairs_in(blank) == blank["num_tokens"] == blank["chosen_tokens"] == 0
    dealt = collator.deal([PAIRS[:1], [], []])
    assert [pairs_in(batch) for batch in dealt] == [1, 0, 0]
    assert [pairs_in(batch) for batch in collator.deal([[], []])] == [0, 0]
