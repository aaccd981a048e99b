"""metrics.py: a mean does not depend on how its values were cut."""

import torch

from axolotl_edpo.training.metrics import WeightedMeans


def here(sums):
    """The reduction of a single process."""
    return sums


def test_every_value_weighs_the_same_whatever_its_batch():
    means = WeightedMeans()
    means.add("x", torch.tensor([1.0, 1.0, 1.0]))
    means.add("x", torch.tensor([5.0]))
    means.add("hit", torch.tensor([True, False]))
    assert means.pop(here) == {"x": 2.0, "hit": 0.5}
    assert means.pop(here) == {}


def test_a_mean_is_over_the_values_since_the_last_log():
    means = WeightedMeans()
    for values in ([1.0, 3.0, 5.0], [7.0]):
        means.add("x", torch.tensor(values))
        assert means.pop(here) == {"x": sum(values) / len(values)}


def test_nothing_to_average_is_zero_and_not_nan():
    means = WeightedMeans()
    means.add("x", torch.zeros(0))
    assert means.pop(here) == {"x": 0.0}


def test_ranks_are_weighted_by_their_values():
    means = WeightedMeans()
    means.add("x", torch.tensor([1.0, 2.0]))
    assert means.pop(lambda s: s + torch.tensor([[9.0, 1.0]])) == {"x": 4.0}
