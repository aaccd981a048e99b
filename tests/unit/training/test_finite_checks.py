"""guard.py: what is not finite, and what is said of it."""

import math

import pytest
import torch
from helpers import tiny

from axolotl_edpo.training import finite_checks as guard


def test_nan_is_found_in_whole_weights_and_not_in_quantized_ones():
    weights = [torch.ones(3, 5) for _ in range(3)] + [torch.ones(2, dtype=torch.uint8)]
    weights[1][2, 4] = math.nan
    weights[2][0, 0] = math.inf  # a bias may be that
    flags = guard.nan_flags(weights, torch.device("cpu"))
    assert flags.tolist() == [0, 1, 0, 0]


def test_a_sum_that_overflows_is_not_taken_for_nan():
    (flag,) = guard.nan_flags([torch.full((8,), 6e4).half()], torch.device("cpu"))
    assert flag == 0


@pytest.mark.parametrize(("value", "broken"), [(1.0, 0), (math.inf, 1), (math.nan, 1)])
def test_numbers_and_tensors_are_finite_or_not(value, broken):
    assert guard.not_finite(value) == guard.not_finite(torch.tensor(value)) == broken


def test_the_error_names_step_beta_and_the_last_complete_checkpoint(tmp_path):
    error = guard.diverged("the loss is", 7, 0.0123, tmp_path)
    assert "in step 7 (β = 0.0123): training stops, there is no checkpoint" in str(
        error
    )
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    error = guard.diverged("the loss is", 7, 0.0123, tmp_path)
    assert f"the last complete checkpoint is {tmp_path / 'checkpoint-4'}" in str(error)


def test_a_gradient_that_overflows_is_left_to_the_scaler_of_fp16(recipe, tmp_path):
    trainer = tiny.train(tmp_path, recipe(max_steps=1))
    overflow = torch.tensor(math.inf)
    with pytest.raises(guard.Diverged, match="the gradient is not finite in step 2"):
        trainer._get_grad_norm(trainer.model, grad_norm=overflow)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer._get_grad_norm(trainer.model, grad_norm=overflow) == overflow
