"""preference.py: what TRL cannot be asked, as it knows one β for all pairs."""

import math

import pytest
import torch
import torch.nn.functional as F

from axolotl_edpo.losses.preference import LOSSES, Answers, PreferenceLoss, wpo_weights
from axolotl_edpo.ops.token_stats import TokenStats
from axolotl_edpo.training.pair_outcomes import margins as margins_of

ANSWERS = Answers(
    chosen=torch.tensor([1.5, -0.5, 0.2]),
    rejected=torch.tensor([-1.0, 0.7, 0.1]),
    chosen_tokens=torch.tensor([3, 5, 2]),
    rejected_tokens=torch.tensor([4, 1, 2]),
    betas=torch.tensor([0.1, 0.2, 0.4]),
)


def settings(name: str) -> PreferenceLoss:
    return PreferenceLoss((name,), label_smoothing=0.1 if name == "exo_pair" else 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_among_others_has_the_loss_it_has_alone(name):
    together = settings(name).losses(ANSWERS)
    for i in range(3):
        alone = Answers(*(value[i : i + 1] for value in ANSWERS))
        assert settings(name).losses(alone) == together[i]


@pytest.mark.parametrize("name", LOSSES)
def test_the_beta_of_a_pair_changes_its_loss_and_no_other(name):
    other = ANSWERS._replace(betas=torch.tensor([0.1, 0.3, 0.4]))
    changed = settings(name).losses(ANSWERS) != settings(name).losses(other)
    assert changed.tolist() == [False, True, False]


def test_losses_per_token_divide_each_answer_by_its_own_length():
    """Margins per token: 1.5/3 + 1/4, -0.5/5 - 0.7/1 and 0.2/2 - 0.1/2."""
    margins = [0.75, -0.8, 0.05]
    torch.testing.assert_close(ANSWERS.mean_margins, torch.tensor(margins))
    # (margin - 1/(2β))², with 1/(2β) of 5, 2.5 and 1.25
    ipo = [4.25**2, 3.3**2, 1.2**2]
    torch.testing.assert_close(settings("ipo").losses(ANSWERS), torch.tensor(ipo))
    norm = [math.log1p(math.exp(-x)) for x in (0.1 * 0.75, 0.2 * -0.8, 0.4 * 0.05)]
    found = settings("sigmoid_norm").losses(ANSWERS)
    torch.testing.assert_close(found, torch.tensor(norm))


def test_robust_is_unbiased_under_flipped_labels():
    """Its mean over labels flipped at rate α is the loss without flips."""
    flipped = ANSWERS._replace(chosen=ANSWERS.rejected, rejected=ANSWERS.chosen)
    robust = PreferenceLoss(("robust",), label_smoothing=0.2)
    mean = 0.8 * robust.losses(ANSWERS) + 0.2 * robust.losses(flipped)
    torch.testing.assert_close(mean, PreferenceLoss().losses(ANSWERS))


def test_a_token_lowers_the_reward_of_its_answer_by_the_penalty():
    """Lengths differ by -1, 4 and 0: 0.1 · 2.5 - 0.5, 0.2 · -1.2 + 2 and 0.4 · 0.1."""
    x = torch.tensor([-0.25, 1.76, 0.04])
    plain = PreferenceLoss(length_penalty=0.5).losses(ANSWERS)
    torch.testing.assert_close(plain, torch.log1p(torch.exp(-x)))
    flipped = torch.log1p(torch.exp(x))
    smoothed = PreferenceLoss(label_smoothing=0.2, length_penalty=0.5)
    expected = 0.8 * plain + 0.2 * flipped
    torch.testing.assert_close(smoothed.losses(ANSWERS), expected)
    robust = PreferenceLoss(("robust",), label_smoothing=0.2, length_penalty=0.5)
    expected = (0.8 * plain - 0.2 * flipped) / 0.6
    torch.testing.assert_close(robust.losses(ANSWERS), expected)


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
def test_without_a_penalty_it_is_dpo_bit_for_bit(name):
    margins = (ANSWERS.chosen - ANSWERS.rejected).requires_grad_()
    chosen = ANSWERS.chosen.clone().requires_grad_()
    answers = ANSWERS._replace(chosen=chosen)
    loss = PreferenceLoss((name,), label_smoothing=0.2, length_penalty=0.0)
    smoothing = {"sigmoid": 0.2, "robust": -0.2 / (1 - 2 * 0.2)}[name]
    x = ANSWERS.betas * margins
    expected = -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)
    found = loss.losses(answers)
    assert torch.equal(found, expected)
    gradients = (
        torch.autograd.grad(values.sum(), of)[0]
        for values, of in ((found, chosen), (expected, margins))
    )
    assert torch.equal(*gradients)


def test_a_penalty_that_no_loss_has_is_refused():
    for types in (("sigmoid",), ("ipo", "robust")):
        assert PreferenceLoss(types, (1.0,) * len(types), length_penalty=0.5)
    message = "`edpo_length_penalty: 0.5`.*of the losses, only sigmoid, robust have it"
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(("ipo", "hinge"), (1.0, 1.0), length_penalty=0.5)


def test_several_losses_add_up_by_their_weights():
    both = PreferenceLoss(("sigmoid", "apo_zero"), (0.8, 0.2)).losses(ANSWERS)
    apart = [settings(name).losses(ANSWERS) for name in ("sigmoid", "apo_zero")]
    torch.testing.assert_close(both, 0.8 * apart[0] + 0.2 * apart[1])


# Two pairs: chosen answers of 3 and 1 tokens, rejected ones of 1 and 2.
LENGTHS = torch.tensor([3, 1, 1, 2])
VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])


@pytest.mark.parametrize(
    ("alpha", "counted"),
    [
        (1.0, [1, 2, 4, 8, 16, 32, 64]),
        (0.5, [1, 1, 2, 8, 16, 32, 32]),
        (0.0, [1, 0, 0, 8, 16, 32, 0]),
    ],
)
def test_tokens_beyond_the_shorter_answer_count_alpha(alpha, counted):
    settings = PreferenceLoss(ld_alpha=alpha)
    assert settings.token_weighted(VALUES, LENGTHS).tolist() == counted


def test_an_empty_answer_leaves_only_a_tail():
    lengths = torch.tensor([2, 0])
    counted = PreferenceLoss(ld_alpha=0.25).token_weighted(VALUES[:2], lengths)
    assert counted.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_ld_alpha_out_of_bounds_is_refused(alpha):
    with pytest.raises(ValueError, match=f"`dpo_ld_alpha: {alpha}`.*from 0 to 1"):
        PreferenceLoss(ld_alpha=alpha)


@pytest.mark.parametrize(("alpha", "margins"), [(1.0, [-9, -88]), (0.5, [-12, -56])])
def test_the_margins_of_beta_dpo_count_tokens_as_the_loss_does(alpha, margins):
    """1 + α (2 + 4) - 16 and 8 - 32 - α 64."""
    zeros = torch.zeros(7)
    stats = TokenStats(*[zeros] * len(TokenStats._fields))
    stats = stats._replace(policy_logp=VALUES - 100, reference_logp=zeros - 100)
    found = margins_of(stats, LENGTHS, PreferenceLoss(ld_alpha=alpha))
    assert found.tolist() == margins


def test_a_pair_weighs_what_the_policy_would_write():
    """Mean log-probabilities relative to Σ p², -0.5 and -1: e^-1.5; no gradient."""
    relative = torch.tensor([-0.5, -1.0], requires_grad=True)
    weights = wpo_weights(relative)
    assert weights.tolist() == pytest.approx([math.exp(-1.5)])
    assert not weights.requires_grad
