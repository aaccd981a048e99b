"""kept.py with tensors: what is kept of a pair, and how large it is."""

import pytest
import torch

from axolotl_edpo.losses.preference import PreferenceLoss
from axolotl_edpo.reference.kept import (
    KeptLogps,
    KeptStates,
    answer_logps,
    logps_folder,
)

# two pairs: chosen answers of 2 and 1 tokens, rejected ones of 1 and 2
LENGTHS = torch.tensor([2, 1, 1, 2])
LOGPS = torch.tensor([-1.0, -2.0, -4.0, -3.0, -1.0, -0.5])
HALF = PreferenceLoss(ld_alpha=0.5)


def kept(kind, values: torch.Tensor, *more):
    """What is kept where the reference computes these values for every batch."""
    batch = {"lengths": LENGTHS}
    return kind(lambda policy, batch: values, None, lambda pairs: batch, *more)


def test_two_numbers_of_a_pair_are_the_sums_over_its_answers():
    first, second = kept(KeptLogps, LOGPS, PreferenceLoss()).of([{}, {}])
    assert (first.chosen.tolist(), first.rejected.tolist()) == ([-3.0], [-3.0])
    assert (second.chosen.tolist(), second.rejected.tolist()) == ([-4.0], [-1.5])
    assert (first.lengths, second.lengths) == ((2, 1), (1, 2))
    assert first.chosen.dtype == torch.float64


def test_tails_count_as_in_the_loss():
    """The second token of the longer answer of each pair counts half."""
    first, second = kept(KeptLogps, LOGPS, HALF).of([{}, {}])
    assert (first.chosen.item(), first.rejected.item()) == (-2.0, -3.0)
    assert (second.chosen.item(), second.rejected.item()) == (-4.0, -1.25)


def test_hidden_states_of_a_pair_are_the_rows_of_its_tokens():
    rows = torch.arange(6.0)[:, None].expand(-1, 3)
    first, second = kept(KeptStates, rows, rows[:1]).of([{}, {}])
    assert [x[:, 0].tolist() for x in first.answers] == [[0, 1], [3]]
    assert [x[:, 0].tolist() for x in second.answers] == [[2], [4, 5]]
    assert (first.lengths, second.lengths) == ((2, 1), (1, 2))


def test_a_rank_without_pairs_keeps_nothing():
    empty = kept(KeptLogps, LOGPS[:0], PreferenceLoss())
    none = KeptLogps(empty.run, None, lambda pairs: {"lengths": LENGTHS[:0]}, HALF)
    assert none.of([]) == []


def test_sums_keep_the_digits_of_their_tokens():
    """In float32 a sum of -3000 is a multiple of 0.0002."""
    logps = torch.full((1000,), -3.0001)
    (total,) = answer_logps(logps, torch.tensor([1000]), PreferenceLoss()).tolist()
    assert total == pytest.approx(1000 * logps[0].item(), abs=1e-9)
    assert abs(logps.sum().item() - total) > 1e-5


def test_sizes_are_those_of_the_values():
    states = kept(KeptStates, LOGPS, torch.zeros(1, 8, dtype=torch.bfloat16))
    assert states.size(2, 1000) == (16_000, "1,000 tokens × 8 × bfloat16")
    assert kept(KeptLogps, LOGPS, HALF).size(3, 1000) == (48, "2 × float64")


def test_each_weight_of_tails_has_a_folder():
    assert logps_folder("abc", PreferenceLoss()) == "abc/answer_logps"
    assert logps_folder("abc", HALF) == "abc/answer_logps-ld-0.5"
