"""finite_checks.py: what is not finite, and what its error says."""

import math

import pytest
import torch

from axolotl_edpo.training.finite_checks import (
    Diverged,
    FiniteCheck,
    nan_flags,
    not_finite,
)


def test_nan_is_found_in_whole_weights_and_not_in_quantized_ones():
    weights = [torch.ones(3, 5) for _ in range(3)] + [torch.ones(2, dtype=torch.uint8)]
    weights[1][2, 4] = math.nan
    weights[2][0, 0] = math.inf  # a bias may be that
    flags = nan_flags(weights, torch.device("cpu"))
    assert flags.tolist() == [0, 1, 0, 0]


def test_a_sum_that_overflows_is_not_taken_for_nan():
    (flag,) = nan_flags([torch.full((8,), 6e4).half()], torch.device("cpu"))
    assert flag == 0


@pytest.mark.parametrize(("value", "broken"), [(1.0, 0), (math.inf, 1), (math.nan, 1)])
def test_numbers_and_tensors_are_finite_or_not(value, broken):
    assert not_finite(value) == not_finite(torch.tensor(value)) == broken


def stopped(folder) -> Diverged:
    with pytest.raises(Diverged) as error:
        FiniteCheck(folder).stop("the loss is", 7, 0.0123)
    return error.value


def test_the_error_names_step_beta_and_the_last_complete_checkpoint(tmp_path):
    error = stopped(tmp_path)
    assert "in step 7 (β = 0.0123): training stops, there is no checkpoint" in str(
        error
    )
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    error = stopped(tmp_path)
    assert f"the last complete checkpoint is {tmp_path / 'checkpoint-4'}" in str(error)
