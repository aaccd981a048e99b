"""controller.py: β moves once per optimizer step, by counts alone."""

import json

import pytest
import torch

from axolotl_edpo.controller import BetaController, ControllerSettings


def here(counts):
    """The reduction of a single process."""
    return counts


def controller(**settings):
    return BetaController(
        ControllerSettings(**{"beta": 0.1, "epsilon": 0.2, **settings})
    )


def test_any_cut_of_a_step_gives_the_same_beta_to_the_last_bit():
    steps = torch.tensor([1, 1, 0, -1, 1, 0, 0, 1, -1, 1, 1, 1, 0, -1, -1, 1])
    betas = set()
    for size in (16, 8, 5, 3, 1):
        c = controller()
        for part in steps.split(size):
            c.observe(part)
        c.advance(here)
        betas.add(c.beta)
    assert betas == {0.1 * (8 / 1.2 + 4 / 0.8 + 4) / 16}


def test_ranks_that_sum_their_counts_agree():
    both = torch.tensor([1, 4, 3])
    a, b = controller(), controller()
    a.observe(torch.tensor([1, 1, 1, 0]))
    b.observe(torch.tensor([0, 0, 0, -1]))
    a.advance(lambda counts: both)
    b.advance(lambda counts: both)
    assert a.beta == b.beta == 0.1 * (3 / 1.2 + 1 / 0.8 + 4) / 8


def test_a_rank_without_pairs_still_takes_part():
    c = controller()
    c.advance(lambda counts: counts + torch.tensor([0, 0, 2]))
    assert c.beta == pytest.approx(0.1 / 1.2)


def test_a_skipped_optimizer_step_leaves_nothing_behind():
    c = controller()
    c.observe(torch.tensor([1, 1]))
    c.discard()
    c.advance(here)
    assert c.beta == 0.1


def test_beta_survives_json_exactly():
    c = controller()
    c.observe(torch.tensor([1, 0, -1]))
    c.advance(here)
    again = controller()
    assert again.load_state_dict(json.loads(json.dumps(c.state_dict()))) == []
    assert again.beta == c.beta


def test_other_settings_in_a_checkpoint_are_named():
    c = controller(epsilon=0.05, beta_mean="harmonic")
    differences = c.load_state_dict({**controller().state_dict(), "beta": 0.07})
    assert c.beta == 0.07
    assert differences == [
        "epsilon was 0.2 in the checkpoint and is 0.05 now",
        "beta_mean was arithmetic in the checkpoint and is harmonic now",
    ]
