"""edpo.py against numbers worked by hand and the limits of Eq. 5 and 6."""

import math

import pytest
import torch

from axolotl_edpo.losses.edpo import next_beta, pair_betas, preference_loss, steps


def test_a_step_needs_strict_monotonicity():
    plus = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 1.0, 0.0, 0.0, -1.0])
    minus = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 1.0, 0.0])
    assert steps(plus, minus).tolist() == [1, -1, 0, 0, 0, 0, 0, 0, 0]


def test_a_step_up_lowers_beta_and_a_step_down_raises_it():
    betas = pair_betas(torch.tensor([1, 0, -1]), beta=0.1, epsilon=0.25)
    torch.testing.assert_close(betas, torch.tensor([0.08, 0.1, 0.1 / 0.75]))


def test_loss_is_minus_log_sigmoid_with_a_beta_per_pair():
    log_ratios = torch.tensor([2.0, -3.0, 0.0], requires_grad=True)
    betas = torch.tensor([0.5, 1.0, 7.0])
    losses = preference_loss(log_ratios, betas)
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(3)), math.log(2)]
    torch.testing.assert_close(losses, torch.tensor(expected))
    losses.sum().backward()  # -β̃ σ(-β̃ x)
    slope = [-0.5 / (1 + math.e), -1 / (1 + math.exp(-3)), -3.5]
    torch.testing.assert_close(log_ratios.grad, torch.tensor(slope))


def test_no_gradient_reaches_the_betas():
    betas = torch.tensor([0.1], requires_grad=True)
    preference_loss(torch.tensor([1.0], requires_grad=True), betas).sum().backward()
    assert betas.grad is None


def test_label_smoothing_is_the_expected_loss_over_a_flipped_label():
    x, betas = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5])
    plain, flipped = preference_loss(x, betas), preference_loss(-x, betas)
    smoothed = preference_loss(x, betas, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * flipped)
    assert not torch.allclose(smoothed, plain)


def test_both_means_of_one_step_by_hand():
    # two up, one down, one stays: (2/1.5 + 1/0.5 + 1)/4 and 1/(1 + 0.5 * 1/4)
    assert next_beta(1.0, 0.5, (1, 1, 2), "arithmetic") == pytest.approx(13 / 12)
    assert next_beta(1.0, 0.5, (1, 1, 2), "harmonic") == pytest.approx(8 / 9)
    assert next_beta(0.3, 0.5, (0, 0, 0), "arithmetic") == 0.3


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5])
def test_the_two_means_drift_apart(epsilon):
    """30 steps, five eighths of the pairs up, three eighths down, from β = 0.1."""
    ends = {}
    for mean in ("arithmetic", "harmonic"):
        ends[mean] = 0.1
        for _ in range(30):
            ends[mean] = next_beta(ends[mean], epsilon, (3, 0, 5), mean)
    per_step = (5 / (1 + epsilon) + 3 / (1 - epsilon)) / 8
    assert ends["arithmetic"] == pytest.approx(0.1 * per_step**30)
    assert ends["harmonic"] == pytest.approx(0.1 / (1 + epsilon / 4) ** 30)
    assert ends["arithmetic"] > ends["harmonic"]
