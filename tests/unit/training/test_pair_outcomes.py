"""pair_outcomes.py with tensors: two pairs, worked by hand."""

import math

import pytest
import torch

from axolotl_edpo.losses.beta_controller import ControllerSettings, make_controller
from axolotl_edpo.losses.preference import PreferenceLoss
from axolotl_edpo.ops.token_stats import TokenStats
from axolotl_edpo.training.pair_outcomes import (
    AnswerStats,
    MeanOverStep,
    margins,
    pair_outcomes,
    traced_values,
)

# tokens: 2 and 1 of the chosen answers, 1 and 2 of the rejected ones
LENGTHS = torch.tensor([2, 1, 1, 2])
POLICY = torch.tensor([-1.0, -2.0, -4.0, -3.0, -1.0, -0.5], requires_grad=True)
REFERENCE = torch.tensor([-1.5, -2.5, -3.0, -2.5, -1.0, -1.5])
PLUS = torch.tensor([0.2, -0.1, -0.3, -0.1, 0.1, 0.0])
MINUS = torch.tensor([-0.2, 0.1, 0.4, 0.1, -0.1, -0.1])
KL = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
BETA, EPSILON = 0.5, 0.25


@pytest.fixture
def stats() -> TokenStats:
    rest = torch.zeros(6)
    return TokenStats(POLICY, REFERENCE, PLUS, MINUS, KL, rest, rest, rest, rest + 0.5)


@pytest.fixture
def controller():
    return make_controller(ControllerSettings(BETA, EPSILON))


def test_steps_betas_losses_and_rewards_of_two_pairs(stats, controller):
    pairs = pair_outcomes(stats, LENGTHS, controller, PreferenceLoss())
    # Δ+ = (0.2 - 0.1) - (-0.1) and -0.3 - (0.1 + 0); Δ- likewise
    torch.testing.assert_close(pairs.plus, torch.tensor([0.2, -0.4]))
    torch.testing.assert_close(pairs.minus, torch.tensor([-0.2, 0.6]))
    assert pairs.steps.tolist() == [1, -1]
    betas = torch.tensor([BETA / (1 + EPSILON), BETA / (1 - EPSILON)])
    torch.testing.assert_close(pairs.betas, betas)
    # log-ratios 0.5 + 0.5 against -0.5; -1 against 0 + 1
    ratios = torch.tensor([1.5, -2.0])
    torch.testing.assert_close(pairs.losses, torch.log1p(torch.exp(-betas * ratios)))
    torch.testing.assert_close(pairs.chosen_rewards, betas * torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(pairs.margins, betas * ratios)
    torch.testing.assert_close(pairs.sft, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(margins(stats, LENGTHS, PreferenceLoss()), ratios)


def test_a_reference_known_by_its_answers_gives_the_same(stats, controller):
    """Its sums are -4, -3, -2.5, -2.5; nothing is known of its tokens."""
    controller = make_controller(ControllerSettings(BETA, control="fixed"))
    unknown, nothing = torch.full((6,), torch.nan), torch.zeros(6)
    tokens = stats._replace(reference_logp=unknown, kl=unknown)
    tokens = tokens._replace(plus=nothing, minus=nothing)
    sums = torch.tensor([-4.0, -3.0, -2.5, -2.5], dtype=torch.float64)
    by_answer = AnswerStats.of(tokens, sums)
    by_token = stats._replace(plus=nothing, minus=nothing)
    own, other = (
        pair_outcomes(given, LENGTHS, controller, PreferenceLoss())
        for given in (by_answer, by_token)
    )
    for name in own._fields:
        torch.testing.assert_close(getattr(own, name), getattr(other, name), msg=name)
    found, expected = (
        torch.autograd.grad(pairs.losses.sum(), POLICY)[0] for pairs in (own, other)
    )
    torch.testing.assert_close(found, expected)
    ratios = margins(by_answer, LENGTHS, PreferenceLoss())
    torch.testing.assert_close(ratios, torch.tensor([1.5, -2.0]))
    halves = PreferenceLoss(ld_alpha=0.5)  # the policy's sums: -2, -4, -3, -1.25
    ratios = margins(by_answer, LENGTHS, halves)
    torch.testing.assert_close(ratios, torch.tensor([2.5, -2.25]))
    assert traced_values(own, by_answer, LENGTHS)[-3].isnan().all()


def test_weights_change_losses_and_nothing_else(stats, controller):
    loss, weights = PreferenceLoss(), torch.tensor([0.0, 2.0])
    plain = pair_outcomes(stats, LENGTHS, controller, loss)
    weighted = pair_outcomes(stats, LENGTHS, controller, loss, weights)
    torch.testing.assert_close(weighted.losses, plain.losses * weights)
    for name in set(plain._fields) - {"losses"}:
        assert torch.equal(getattr(weighted, name), getattr(plain, name)), name


def test_gradient_flows_to_the_policy_by_beta_and_margin(stats, controller):
    pairs = pair_outcomes(stats, LENGTHS, controller, PreferenceLoss())
    (gradient,) = torch.autograd.grad(pairs.losses.sum(), POLICY)
    pull = [
        beta / (1 + math.exp(beta * ratio))
        for beta, ratio in ((0.4, 1.5), (2 / 3, -2.0))
    ]
    expected = [-pull[0], -pull[0], -pull[1], pull[0], pull[1], pull[1]]
    torch.testing.assert_close(gradient, torch.tensor(expected))


def test_a_micro_batch_is_its_share_of_the_step(stats, controller):
    pairs = pair_outcomes(stats, LENGTHS, controller, PreferenceLoss())
    batch, router = {"chosen_tokens": 3}, torch.tensor(1.5)
    alone = MeanOverStep()(pairs, batch, None, None)
    torch.testing.assert_close(alone, pairs.losses.mean())
    # 8 pairs on 2 ranks, whose gradients the engine averages; 20 chosen tokens
    mean, counts = MeanOverStep(2, 0.5, 0.1), torch.tensor([8, 20])
    share = mean(pairs, batch, counts, router)
    expected = pairs.losses.sum() / 4 + 0.5 * 7 / 10 + 0.1 * (2 / 4) * 1.5
    torch.testing.assert_close(share, expected)


def test_the_loss_of_a_set_is_that_of_one_step_with_all_its_pairs(stats, controller):
    pairs = pair_outcomes(stats, LENGTHS, controller, PreferenceLoss())
    mean, router = MeanOverStep(1, 0.5, 0.1), torch.tensor(1.5)
    step = mean(pairs, {"chosen_tokens": 3}, torch.tensor([2, 3]), router).item()
    whole = mean.of_whole_set(pairs.losses.mean().item(), 7 / 3, 1.5)
    assert whole == pytest.approx(step)


def test_a_batch_without_pairs_adds_nothing(controller):
    empty = torch.zeros(0, requires_grad=True)
    stats = TokenStats(*[empty] * 9)
    lengths = torch.zeros(0, dtype=torch.int64)
    pairs = pair_outcomes(stats, lengths, controller, PreferenceLoss())
    share = MeanOverStep()(pairs, {"chosen_tokens": 0}, None, None)
    assert share.item() == 0
    share.backward()


def test_traced_values_are_per_pair_and_kl_is_per_token(stats, controller):
    pairs = pair_outcomes(stats, LENGTHS, controller, PreferenceLoss())
    *_, kl, chosen, rejected = traced_values(pairs, stats, LENGTHS)
    assert kl.tolist() == pytest.approx([(1 + 2 + 4) / 3, (3 + 5 + 6) / 3])
    assert (chosen.tolist(), rejected.tolist()) == ([2, 1], [1, 2])
