"""packing.py on a batch small enough to read."""

import pytest
import torch

from axolotl_edpo.data.packing import Segments, balance_by_tokens, pack

PADDED = {  # two pairs: (5 6 | 7 8) against (5 6 | 9), and (4 | 3) against (4 | 3 2)
    "input_ids": torch.tensor([[5, 6, 7, 8], [4, 3, 0, 0], [5, 6, 9, 0], [4, 3, 2, 0]]),
    "attention_mask": torch.tensor(
        [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    ),
    "completion_mask": torch.tensor(
        [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]]
    ),
}


def test_a_packed_row_holds_pair_after_pair_without_padding():
    row = pack(PADDED, share=False)
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6, 9, 4, 3, 4, 3, 2]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert row["segments"] == Segments(
        (4, 3, 2, 3), (4, 3, 2, 3), ((0,), (1,), (2,), (3,))
    )
    # all chosen, then all rejected
    assert row["positions"].tolist() == [1, 2, 7, 5, 9, 10]
    assert row["targets"].tolist() == [7, 8, 3, 9, 3, 2]
    assert row["lengths"].tolist() == [2, 1, 1, 2]


def test_a_shared_start_is_in_the_row_once_even_beyond_the_prompt():
    row = pack(PADDED, share=True)
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 2]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    segments = row["segments"]
    assert segments.pieces == (2, 2, 1, 2, 1)
    assert segments.queries == (4, 1, 2, 1)
    assert segments.keys == ((0, 1), (0, 2), (3,), (3, 4))
    assert segments.key_lengths == (4, 3, 2, 3)
    # the last prompt token predicts the first of both answers
    assert row["positions"].tolist() == [1, 2, 5, 1, 5, 6]
    assert row["targets"].tolist() == [7, 8, 3, 9, 3, 2]
    assert row["lengths"].tolist() == [2, 1, 1, 2]


def test_a_row_is_filled_up_to_a_multiple_by_a_segment_of_its_own():
    row = pack(PADDED, share=True, pad_token_id=99, multiple=6)
    assert row["input_ids"][0, 8:].tolist() == [99] * 4
    assert row["segments"].pieces[-1] == row["segments"].queries[-1] == 4
    assert row["segments"].keys[-1] == (5,)
    assert row["positions"].tolist() == [1, 2, 5, 1, 5, 6]


def test_equal_answers_leave_the_second_branch_empty():
    same = {name: values[[0, 0]] for name, values in PADDED.items()}
    row = pack(same, share=True)
    assert row["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert row["segments"] == Segments((4,), (4,), ((0,),))
    assert row["positions"].tolist() == [1, 2, 1, 2]
    assert row["lengths"].tolist() == [2, 2]


def test_the_longest_item_goes_first_into_the_emptiest_bin():
    assert balance_by_tokens([7, 1, 5, 4, 3, 2], 2) == [[0, 1, 4], [2, 3, 5]]
    assert balance_by_tokens([9, 1, 1], 3) == [[0], [1], [2]]
    assert balance_by_tokens([2, 2], 1) == [[0, 1]]


def test_every_bin_gets_an_item_and_every_item_a_bin():
    generator = torch.Generator().manual_seed(0)
    for bins in range(1, 9):
        for count in range(bins, 40, 5):
            sizes = torch.randint(1, 2000, (count,), generator=generator).tolist()
            balanced = balance_by_tokens(sizes, bins)
            assert len(balanced) == bins and all(balanced)
            assert sorted(sum(balanced, [])) == list(range(count))


def test_no_attention_can_read_the_mask_of_a_packed_row():
    mask = pack(PADDED, share=True)["attention_mask"]
    assert mask.dim() == 4 and mask.numel() == 0
    with pytest.raises(RuntimeError, match="must match"):
        torch.zeros(1, 2, 8, 8) + mask
