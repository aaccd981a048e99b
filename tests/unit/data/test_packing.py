"""batch.py on a batch small enough to read."""

import torch

from axolotl_edpo.data.packing import (
    Segments,
    chosen_minus_rejected,
    deal,
    pack,
    select_completions,
    sum_per_sequence,
)


def test_only_positions_that_predict_a_completion_token_are_scored():
    ids = torch.tensor([[5, 6, 7, 8, 2], [5, 6, 9, 2, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]])
    positions, targets, lengths = select_completions(ids, mask)
    assert positions.tolist() == [1, 2, 6]  # row 1 begins at 5
    assert targets.tolist() == [7, 8, 9]
    assert lengths.tolist() == [2, 1]


def test_a_completion_token_without_a_position_before_it_is_left_out():
    ids = torch.tensor([[5, 6]])
    positions, targets, lengths = select_completions(ids, torch.ones(1, 2))
    assert (positions.tolist(), targets.tolist(), lengths.tolist()) == ([0], [6], [1])


def test_sums_follow_the_sequences_and_an_empty_one_is_zero():
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = sum_per_sequence(values, torch.tensor([2, 0, 1]))
    assert sums.tolist() == [3.0, 0.0, 4.0]
    (sums * torch.tensor([1.0, 5.0, 7.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 7.0]


def test_no_completion_at_all_gives_differentiable_zeros():
    values = torch.zeros(0, requires_grad=True)
    sums = sum_per_sequence(values, torch.tensor([0, 0]))
    assert sums.tolist() == [0.0, 0.0]
    sums.sum().backward()
    assert values.grad.shape == (0,)


def test_all_chosen_come_before_all_rejected():
    values = torch.tensor([10.0, 20.0, 1.0, 2.0])
    assert chosen_minus_rejected(values).tolist() == [9.0, 18.0]


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


def test_dealing_puts_the_longest_first_into_the_emptiest():
    assert deal([7, 1, 5, 4, 3, 2], 2) == [[0, 1, 4], [2, 3, 5]]
    assert deal([9, 1, 1], 3) == [[0], [1], [2]]
    assert deal([2, 2], 1) == [[0, 1]]


def test_every_bin_gets_an_item_and_every_item_a_bin():
    generator = torch.Generator().manual_seed(0)
    for bins in range(1, 9):
        for count in range(bins, 40, 5):
            sizes = torch.randint(1, 2000, (count,), generator=generator).tolist()
            dealt = deal(sizes, bins)
            assert len(dealt) == bins and all(dealt)
            assert sorted(sum(dealt, [])) == list(range(count))
