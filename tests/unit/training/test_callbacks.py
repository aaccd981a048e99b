"""callbacks.py: what a checkpoint holds of a run."""

import json

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerState

from axolotl_edpo.losses.beta_controller import ControllerSettings, make_controller
from axolotl_edpo.models.completion_forward import CompletionForward
from axolotl_edpo.reference.provider import AdapterReference
from axolotl_edpo.run_files import CONTROLLER
from axolotl_edpo.training.callbacks import EDPOCallback
from axolotl_edpo.training.finite_checks import FiniteCheck
from axolotl_edpo.training.first_step import FirstStep
from axolotl_edpo.training.health import HealthCheck
from axolotl_edpo.training.metrics import PairMetrics
from axolotl_edpo.training.pair_outcomes import MeanOverStep
from axolotl_edpo.training.records import StepRecords
from axolotl_edpo.training.step_counts import StepCounts


@pytest.fixture
def start(tmp_path):
    """A function that makes β, the records and the callback of a run."""

    def parts():
        accelerator = Accelerator(cpu=True)
        controller = make_controller(ControllerSettings(0.1, 0.01))
        counts = StepCounts(accelerator, controller, FiniteCheck(tmp_path))
        metrics = PairMetrics(True, MeanOverStep())
        first_step = FirstStep(accelerator, 0.01, [])
        records = StepRecords(accelerator, metrics, counts, None, first_step)
        reference = AdapterReference(CompletionForward(accelerator))
        return (
            controller,
            records,
            EDPOCallback(controller, reference, records, HealthCheck()),
        )

    return parts


def test_a_resumed_run_goes_on_from_the_beta_and_the_tokens_of_its_checkpoint(start):
    controller, records, callback = start()
    controller.beta = 0.25
    for tokens in (300, 12):
        records.metrics.add_tokens(torch.tensor(tokens))
    saved = json.loads(json.dumps(callback.saved_state()))
    controller, records, callback = start()
    state = TrainerState(global_step=2, stateful_callbacks={CONTROLLER: saved})
    callback.on_train_begin(None, state, None)
    apart = torch.tensor([1.0]), torch.tensor([1])
    records._first_step.observe(*apart)  # it has learned, so nothing is compared
    records.metrics.add_tokens(torch.tensor(1))
    assert (controller.beta, records.metrics.tokens) == (0.25, 313)
