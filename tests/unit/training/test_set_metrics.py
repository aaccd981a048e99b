"""set_metrics.py: metrics of a set, worked by hand."""

from axolotl_edpo.training.pair_outcomes import MeanOverStep
from axolotl_edpo.training.set_metrics import (
    CHOSEN_TOKENS,
    KL_SUM,
    SFT_SUM,
    TOKENS,
    SetMetrics,
)


def means_of(number: int, **more: float) -> dict[str, float]:
    """Means over the pairs of a set, as they are summed over ranks."""
    means = {
        "loss": 0.5,
        TOKENS: 8.0,
        CHOSEN_TOKENS: 2.0,
        KL_SUM: 4.0,
        SFT_SUM: 6.0,
        **more,
    }
    return {f"set{number}/{key}": value for key, value in means.items()}


def test_loss_and_kl_of_a_set_are_those_over_its_tokens():
    means = {
        "loss": 0.25,
        **means_of(0),
        **means_of(1, **{KL_SUM: 2.0, "aux_loss": 1.0}),
    }
    sets = SetMetrics(("easy", "hard"), True, MeanOverStep(1, 0.5, 0.125))
    sets.finish(means)
    assert means == {
        "loss": 0.25,
        "easy_loss": 0.5 + 0.5 * 6 / 2,
        "easy_kl/policy_ref": 4 / 8,
        "hard_loss": 0.5 + 0.5 * 6 / 2 + 0.125,
        "hard_aux_loss": 1.0,
        "hard_kl/policy_ref": 2 / 8,
    }


def test_a_set_without_pairs_has_no_metrics():
    """As where `axolotl evaluate` runs over the training set."""
    nothing = dict.fromkeys(("loss", TOKENS, CHOSEN_TOKENS, KL_SUM, SFT_SUM), 0.0)
    means = {"loss": 0.25, **means_of(0, **nothing)}
    SetMetrics(("easy",), True, MeanOverStep()).finish(means)
    assert means == {"loss": 0.25}
