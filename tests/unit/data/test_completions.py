"""completions.py on a batch small enough to read."""

import torch

from axolotl_edpo.data.completions import (
    chosen_minus_rejected,
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
