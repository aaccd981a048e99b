"""first_step.py: which differences stop a run, when, and what the error says."""

import math

import pytest
import torch
from accelerate import Accelerator

from axolotl_edpo.training import first_step
from axolotl_edpo.training.first_step import AGAIN, ZERO3, FirstStep, WrongStart

LENGTHS = torch.tensor([2, 3])


def check(bound: float | None = 0.01) -> FirstStep:
    return FirstStep(Accelerator(cpu=True), bound, [AGAIN, ZERO3])


def observe(check: FirstStep, log_ratios, last: bool = True) -> None:
    """A micro-batch of two answers with these log-ratios."""
    check._accelerator.gradient_state._set_sync_gradients(last)
    check.observe(torch.tensor(log_ratios).requires_grad_(), LENGTHS)


def test_sums_of_answers_are_compared_per_token():
    """(|0| + |-0.045|) over 5 tokens is 0.009."""
    observe(check(), [0.0, -0.045])
    with pytest.raises(WrongStart, match="differ by 0.0114 nats per token on rank 0"):
        observe(check(), [0.05, -0.007])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_the_run_wherever_it_is(value):
    started = check()
    observe(started, [0.0, value], last=False)
    observe(started, [0.0] * 2, last=False)
    with pytest.raises(WrongStart, match="are not finite on rank 0: training stops"):
        observe(started, [0.0] * 2)


def test_the_run_stops_with_the_last_micro_batch_of_the_first_step_only():
    started = check()
    observe(started, [1.0] * 2, last=False)
    with pytest.raises(WrongStart):
        observe(started, [0.0] * 2)
    started = check()
    observe(started, [0.0] * 2)
    observe(started, [1.0] * 2)  # the policy has learned


def test_nothing_is_compared_in_a_run_that_is_resumed_or_starts_apart():
    resumed = check()
    resumed.end()
    observe(resumed, [1.0] * 2)
    observe(check(None), [math.nan] * 2)


def test_a_micro_batch_without_pairs_differs_in_nothing():
    check().observe(torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def test_the_error_names_the_largest_difference_its_ranks_and_the_remedies():
    text = first_step._message([0.001, 0.25, 1.5], 0.01, [AGAIN, ZERO3])
    assert text == (
        "the run starts from its reference, but in step 1 the log-probabilities of "
        "policy and reference differ by 1.5 nats per token on ranks 1, 2 (rounding: "
        "below 0.01): training stops before a weight changes. Weights were loaded or "
        f"gathered wrongly: {AGAIN}; {ZERO3}"
    )
    assert "are not finite on ranks 0, 2" in first_step._message(
        [math.nan, 0.0, 0.5], 0.01, [AGAIN]
    )
