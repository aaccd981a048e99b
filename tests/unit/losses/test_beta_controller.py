"""beta_controller.py: β moves once per optimizer step, as its control says."""

import json
import math
import random

import pytest
import torch

from axolotl_edpo.losses.beta_controller import (
    BetaController,
    ControllerSettings,
    EpsilonController,
    MarginController,
    make_controller,
)


def advance(controller):
    """In a single process."""
    controller.advance([int(count) for count in controller.observed()])


def controller(**settings):
    return EpsilonController(
        ControllerSettings(**{"beta": 0.1, "epsilon": 0.2, **settings})
    )


def test_any_cut_of_a_step_gives_the_same_beta_to_the_last_bit():
    steps = torch.tensor([1, 1, 0, -1, 1, 0, 0, 1, -1, 1, 1, 1, 0, -1, -1, 1])
    betas = set()
    for size in (16, 8, 5, 3, 1):
        c = controller()
        for part in steps.split(size):
            c.observe(part)
        advance(c)
        betas.add(c.beta)
    assert betas == {0.1 * (8 / 1.2 + 4 / 0.8 + 4) / 16}


def test_ranks_that_sum_their_counts_agree():
    a, b = controller(), controller()
    a.observe(torch.tensor([1, 1, 1, 0]))
    b.observe(torch.tensor([0, 0, 0, -1]))
    summed = [int(x + y) for x, y in zip(a.observed(), b.observed(), strict=True)]
    assert summed == [1, 4, 3]
    a.advance(summed)
    b.advance(summed)
    assert a.beta == b.beta == 0.1 * (3 / 1.2 + 1 / 0.8 + 4) / 8


def test_a_rank_without_pairs_still_takes_part():
    c = controller()
    assert [int(count) for count in c.observed()] == [0, 0, 0]
    c.advance([0, 0, 2])
    assert c.beta == pytest.approx(0.1 / 1.2)


def test_a_skipped_optimizer_step_leaves_nothing_behind():
    c = controller()
    c.observe(torch.tensor([1, 1]))
    c.discard()
    advance(c)
    assert c.beta == 0.1


def test_a_step_moves_beta_by_its_own_pairs_only():
    """Two up, then one down: β/1.2, and of that 1/0.8."""
    c = controller()
    c.observe(torch.tensor([1, 1]))
    advance(c)
    c.observe(torch.tensor([-1]))
    assert [int(count) for count in c.observed()] == [1, 0, 0]
    advance(c)
    assert c.beta == pytest.approx(0.1 / 1.2 / 0.8)


def test_beta_survives_json_exactly():
    c = controller()
    c.observe(torch.tensor([1, 0, -1]))
    advance(c)
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


def margin_controller(**settings):
    return make_controller(ControllerSettings(0.1, control="batch_margin", **settings))


def begin(c, margins, noise=None):
    """Begins a step with margins of pairs; which of them it keeps."""
    margins = torch.tensor(margins, dtype=torch.float64)
    noise = torch.tensor(noise or [0.0] * len(margins), dtype=torch.float64)
    kept = c.begin(margins, noise)
    assert (kept.shape, kept.dtype) == (margins.shape, torch.bool)
    return kept.tolist()


def test_a_recipe_gets_the_controller_it_names():
    kinds = {
        kind: type(make_controller(ControllerSettings(0.1, control=kind)))
        for kind in ("epsilon", "fixed", "batch_margin")
    }
    assert kinds == {
        "epsilon": EpsilonController,
        "fixed": BetaController,
        "batch_margin": MarginController,
    }


def test_a_fixed_beta_stays_whatever_pairs_and_checkpoints_say():
    c = make_controller(ControllerSettings(0.1, control="fixed"))
    c.observe(torch.tensor([1, 1]))
    advance(c)
    assert c.pair_betas(torch.tensor([1, 0, -1])).tolist() == pytest.approx([0.1] * 3)
    differences = c.load_state_dict({**controller().state_dict(), "beta": 0.07})
    assert (c.beta, c.epsilon) == (0.1, None)
    assert differences == ["control was epsilon in the checkpoint and is fixed now"]


def test_the_margins_of_three_steps_move_beta_as_worked_by_hand():
    """α 0.6, m 0.9. M₀: 0, then 0.1·2 = 0.2, then 0.9·0.2 + 0.1·(-1) = 0.08."""
    c = margin_controller()
    betas, averages = [], []
    for margins in ([0.0, 0.0], [1.0, 3.0], [-4.0, 2.0]):
        assert begin(c, margins) == [True, True]
        betas.append(c.pair_betas(torch.tensor([0])).item())
        averages.append(c.metrics()["kl/margin_average"])
        advance(c)
    assert averages == pytest.approx([0.0, 0.2, 0.08])
    by_hand = [0.1, 0.1 * (1 + 0.6 * (2 - 0.2)), 0.1 * (1 + 0.6 * (-1 - 0.08))]
    assert by_hand == pytest.approx([0.1, 0.208, 0.0352])
    assert betas == pytest.approx(by_hand)
    assert c.average == pytest.approx(0.08)


def margins_after(c, *margins):
    """Begins a step with these; the step before had a margin of 0."""
    begin(c, [0.0, 0.0])
    advance(c)
    return begin(c, margins)


def test_beta_of_a_batch_has_a_floor():
    c = margin_controller(margin_weight=2.0, margin_momentum=0.5)
    margins_after(c, -3.0)  # 0.1 (1 + 2 (-3 + 1.5)) is below 0
    assert c.beta == 1e-3


def test_beta_is_the_recipes_between_steps():
    c = margin_controller()
    margins_after(c, 2.0)
    assert c.beta > 0.2 and c.has_begun
    advance(c)
    assert (c.beta, c.has_begun) == (0.1, False)


def test_averages_begin_with_the_first_step():
    c = margin_controller()
    begin(c, [9.0, 11.0])  # as of a policy that was trained before
    assert c.beta == 0.1
    advance(c)
    assert (c.average, c.deviation) == (10.0, pytest.approx(2**0.5))


def test_a_reference_that_takes_over_a_share_of_the_policy_takes_it_of_the_averages():
    c = margin_controller()
    c.reference_moved(0.5)
    assert c.average is None
    begin(c, [3.0, 5.0])
    advance(c)
    c.reference_moved(0.25)
    assert (c.average, c.deviation) == (3.0, pytest.approx(0.75 * 2**0.5))
    c.reference_moved(1.0)
    begin(c, [0.0, 0.0])
    assert c.beta == 0.1


def test_the_filter_keeps_the_share_nearest_to_the_average_without_noise():
    """M₀ 0.1·3 = 0.3; β is by the mean of what is kept, (0 + 1 + 2 + 3) / 4."""
    c = margin_controller(margin_keep=0.8)
    kept = margins_after(c, 9.0, 0.0, 1.0, 2.0, 3.0)
    assert kept == [False, True, True, True, True]
    assert c.beta == pytest.approx(0.1 * (1 + 0.6 * (1.5 - 0.3)))


def test_the_filter_draws_pairs_as_often_as_their_weights_say():
    """One of two pairs, weights exp(-z²/2): the nearer is taken by the logistic law."""
    c = margin_controller(margin_keep=0.5)
    c.average, c.deviation = 0.0, 1.0
    # M₀ 0.1 · 0.5, σ 0.9 + 0.1 · sd(0, 1)
    average, deviation = 0.05, 0.9 + 0.1 * 0.5**0.5
    weights = [math.exp(-(((x - average) / deviation) ** 2) / 2) for x in (0.0, 1.0)]
    rng = random.Random(0)
    draws = 4000
    near = sum(
        begin(c, [0.0, 1.0], [-math.log(-math.log(rng.random())) for _ in range(2)])[0]
        for _ in range(draws)
    )
    share = weights[0] / sum(weights)
    assert near / draws == pytest.approx(share, abs=4 * (0.25 / draws) ** 0.5)


def test_before_there_is_a_spread_the_filter_goes_by_noise_alone():
    c = margin_controller(margin_keep=0.5)
    assert begin(c, [0.0, 0.0], [1.0, 2.0]) == [False, True]


def test_the_order_of_pairs_does_not_matter_to_the_last_bit():
    rng = random.Random(1)
    pairs = [(rng.gauss(0, 3), rng.gauss(0, 1)) for _ in range(64)]
    states = set()
    for _ in range(5):
        rng.shuffle(pairs)
        c = margin_controller(margin_keep=0.8)
        kept = begin(c, *map(list, zip(*pairs, strict=True)))
        drawn = sorted(p for p, k in zip(pairs, kept, strict=True) if k)
        beta = c.beta
        advance(c)
        states.add((beta, c.average, c.deviation, *drawn))
    assert len(states) == 1


def test_the_draw_is_what_sums_of_log_weights_and_noise_say_one_by_one():
    """In Python's numbers; of pairs with equal sums, the first are kept."""
    rng = random.Random(2)
    margins = [rng.gauss(0, 3) for _ in range(20)] * 2
    noise = [rng.gauss(0, 1) for _ in range(20)] * 2
    c = margin_controller(margin_keep=0.5)
    c.average, c.deviation = 1.0, 2.0
    kept = begin(c, margins, noise)
    advance(c)
    sums = [
        draw - ((margin - c.average) / c.deviation) ** 2 / 2
        for margin, draw in zip(margins, noise, strict=True)
    ]
    best = sorted(range(40), key=lambda i: -sums[i])[:20]
    assert [i for i in range(40) if kept[i]] == sorted(best)
    odd = begin(margin_controller(margin_keep=0.5), [0.0] * 3, [1.0, 1.0, 1.0])
    assert odd == [True, False, False]


def test_a_skipped_step_and_a_step_without_pairs_leave_the_average():
    c = margin_controller()
    margins_after(c, 5.0)
    c.discard()
    advance(c)
    assert begin(c, []) == []
    advance(c)
    assert (c.average, c.beta) == (0.0, 0.1)


def test_averages_survive_json_exactly():
    c = margin_controller()
    margins_after(c, 0.3, 0.1)
    advance(c)
    again = margin_controller()
    assert again.load_state_dict(json.loads(json.dumps(c.state_dict()))) == []
    assert (again.average, again.deviation) == (c.average, c.deviation)
    assert c.average != 0.0 != c.deviation
    again.reset()
    assert (again.beta, again.average, again.deviation) == (0.1, None, None)


def test_another_control_begins_where_the_recipe_does():
    """The β of one is nothing to the other; a checkpoint that names none is ε-DPO's."""
    c = controller()
    state = {**margin_controller().state_dict(), "beta": 0.001}
    assert "control was batch_margin in the checkpoint" in c.load_state_dict(state)[0]
    assert c.beta == 0.1
    old = {**c.state_dict(), "beta": 0.07}
    del old["control"]
    assert c.load_state_dict(old) == [] and c.beta == 0.07
