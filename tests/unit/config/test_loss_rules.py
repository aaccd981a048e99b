"""loss_rules.py: what does not go with a loss without a reference, and the reverse."""

import pytest

from axolotl_edpo.config.args import handed_on
from axolotl_edpo.config.validate import check_recipe

FIXED = {"rl": "edpo", "edpo_control": "fixed"}
SIMPO = {**FIXED, "dpo_loss_type": ["simpo"]}
ORPO = {**FIXED, "dpo_loss_type": ["orpo"]}
WRONG = [
    (
        SIMPO | {"edpo_control": None},
        r"`dpo_loss_type: \[simpo\]`.*`edpo_control: fixed`",
    ),
    (SIMPO | {"edpo_control": "epsilon"}, r"`edpo_control: fixed`"),
    (SIMPO | {"edpo_control": "batch_margin"}, r"`edpo_control: fixed`"),
    (
        FIXED | {"dpo_loss_type": ["cpo", "sigmoid"]},
        r"`dpo_loss_type: \[cpo, sigmoid\]`.*stand alone$",
    ),
    (
        FIXED | {"dpo_loss_type": ["simpo", "sft"]},
        r"`dpo_loss_type: \[simpo, sft\]`.*stand alone; `cpo_alpha`.*of `sft`",
    ),
    (
        SIMPO | {"precompute_ref_log_probs": True},
        r"`precompute_ref_log_probs: true`.*`dpo_loss_type: \[simpo\]` has no",
    ),
    (SIMPO | {"edpo_reference_cache": "a"}, r"`edpo_reference_cache: a`.*no reference"),
    (
        SIMPO | {"trl": {"sync_ref_model": True}},
        r"`trl.sync_ref_model: true`.*no reference",
    ),
    (
        SIMPO | {"rl_adapter_ref_model": True, "adapter": "lora"},
        r"`rl_adapter_ref_model: true`.*no reference",
    ),
    (SIMPO | {"edpo_max_kl": 1.0}, r"`edpo_max_kl: 1.0`.*no reference"),
    (
        SIMPO | {"metric_for_best_model": "eval_kl/policy_ref"},
        r"`metric_for_best_model: eval_kl/policy_ref`.*no KL",
    ),
    (SIMPO | {"dpo_use_weighting": True}, r"`dpo_use_weighting: true`.*log-ratios"),
    (SIMPO | {"dpo_ld_alpha": 0.5}, r"`dpo_ld_alpha: 0.5`.*log-ratios"),
    (SIMPO | {"dpo_label_smoothing": 0.1}, r"`dpo_label_smoothing: 0.1`.*only sigmoid"),
    (
        ORPO | {"beta": 0.1},
        r"`beta: 0.1`.*remove it: `dpo_loss_type: \[orpo\]` has no β",
    ),
    (ORPO | {"rl_beta": 0.1}, r"`rl_beta: 0.1`.*has no β"),
    (ORPO | {"trl": {"beta": 0.1}}, r"`trl.beta: 0.1`.*has no β"),
    (ORPO | {"cpo_alpha": 1.0}, r"`cpo_alpha: 1.0`.*only with cpo, slic, rrhf, simpo"),
    (SIMPO | {"orpo_alpha": 0.1}, r"`orpo_alpha: 0.1`.*`\[?.*simpo\]`, only with orpo"),
    (SIMPO | {"edpo_slic_delta": 1.0}, r"`edpo_slic_delta: 1.0`.*only with slic"),
    ({"rl": "edpo", "simpo_gamma": 0.5}, r"`simpo_gamma: 0.5`.*`dpo_loss_type: \[sigm"),
    (SIMPO | {"simpo_gamma": -1}, r"`simpo_gamma: -1`.*greater than or equal to 0"),
    (SIMPO | {"cpo_alpha": float("inf")}, r"`cpo_alpha: \.inf`.*finite"),
    (ORPO | {"orpo_alpha": 0}, r"`orpo_alpha: 0`.*greater than 0"),
    (
        FIXED | {"dpo_loss_type": ["slic"], "edpo_slic_delta": 0},
        r"`edpo_slic_delta: 0`.*greater than 0",
    ),
]
RIGHT = [
    SIMPO | {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    SIMPO | {"precompute_ref_log_probs": False, "dpo_ld_alpha": None},
    ORPO | {"orpo_alpha": 0.2},
    FIXED | {"dpo_loss_type": ["cpo"], "cpo_alpha": 0.5, "dpo_loss_weights": [2.0]},
    FIXED | {"dpo_loss_type": ["slic"], "edpo_slic_delta": 2.0, "cpo_alpha": 0.1},
    FIXED | {"dpo_loss_type": ["rrhf"], "edpo_log_pairs": 1},
]


@pytest.mark.parametrize(("recipe", "message"), WRONG, ids=lambda v: str(v)[-40:])
def test_what_does_not_go_together_is_one_line(recipe, message):
    recipe = {key: value for key, value in recipe.items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        check_recipe(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", RIGHT, ids=str)
def test_what_a_loss_uses_is_taken(recipe):
    assert check_recipe(recipe) == recipe.get("beta")


@pytest.mark.parametrize(
    ("loss", "beta"), [("orpo", 1.0), ("slic", 1.0), ("cpo", None), ("sigmoid", None)]
)
def test_a_loss_without_a_beta_has_the_beta_1(loss, beta):
    """So axolotl does not pass `orpo_alpha` on as β."""
    assert handed_on({"dpo_loss_type": [loss]}).get("beta") == beta
