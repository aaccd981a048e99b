"""layout.py: which layout a recipe asks for."""

from types import SimpleNamespace

import pytest

from axolotl_edpo.data.layout import LayoutSettings


def recipe(**keys) -> SimpleNamespace:
    base = dict(
        dpo_padding_free=None,
        edpo_sample_packing=False,
        edpo_eval_sample_packing=None,
        edpo_prefix_sharing="auto",
    )
    return SimpleNamespace(**{**base, **keys})


@pytest.mark.parametrize(
    ("keys", "packs", "balances", "eval_packs"),
    [
        ({}, False, False, False),
        ({"dpo_padding_free": True}, True, False, True),
        ({"edpo_sample_packing": True}, True, True, True),
        ({"edpo_sample_packing": "auto"}, True, True, True),
        (
            {"edpo_sample_packing": True, "edpo_eval_sample_packing": False},
            True,
            True,
            False,
        ),
        ({"edpo_eval_sample_packing": True}, False, False, True),
        (
            {"dpo_padding_free": True, "edpo_eval_sample_packing": False},
            True,
            False,
            False,
        ),
    ],
    ids=str,
)
def test_a_recipe_says_how_training_and_evaluation_are_laid_out(
    keys, packs, balances, eval_packs
):
    settings = LayoutSettings.from_config(recipe(**keys))
    found = settings.packs, settings.balances, settings.eval_packs
    assert found == (packs, balances, eval_packs)
    assert settings.may_pad == ("auto" in keys.values())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            LayoutSettings(packs=True, balances=True, eval_packs=True),
            "packed (padding-free in evaluation), shared prefixes once",
        ),
        (
            LayoutSettings(packs=True, shares=False),
            "padding-free (padded in evaluation), shared prefixes twice",
        ),
        (
            LayoutSettings(eval_packs=True),
            "padded (padding-free in evaluation), shared prefixes once",
        ),
    ],
)
def test_the_log_says_which_layout_is_used(settings, line):
    assert settings.description() == f"Batches: {line} in a row."
