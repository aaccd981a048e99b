"""step_counts.py: counts of a step, and the run that they stop."""

import pytest
import torch
from accelerate import Accelerator

from axolotl_edpo.losses.beta_controller import ControllerSettings, make_controller
from axolotl_edpo.training.finite_checks import Diverged, FiniteCheck
from axolotl_edpo.training.step_counts import StepCounts

LOSSES = torch.tensor([0.5, 0.7])


@pytest.fixture
def counts(tmp_path):
    controller = make_controller(ControllerSettings(0.1, 0.01))
    return StepCounts(Accelerator(cpu=True), controller, FiniteCheck(tmp_path))


def observe(counts: StepCounts, steps: list[int], losses, last: bool) -> None:
    counts._accelerator.gradient_state._set_sync_gradients(last)
    counts.observe(torch.tensor(steps), losses, step=3)


def test_counts_are_summed_with_the_last_micro_batch_only(counts):
    observe(counts, [1, -1], LOSSES, last=False)
    assert counts.totals == ()
    observe(counts, [1, 0], LOSSES, last=True)
    assert counts.totals == [1, 1, 2]  # s = -1, 0, +1


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_micro_batch(counts):
    observe(counts, [1, 1], LOSSES * float("nan"), last=False)
    with pytest.raises(Diverged, match="the loss of 2 of the step's pairs .* step 3"):
        observe(counts, [1, 1], LOSSES, last=True)
    assert counts.finite.take() == 0  # the next step begins anew
