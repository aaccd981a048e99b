"""`EDPOCallback`: what happens once per run and once per optimizer step.

start of a run   prepares for the first batch, restores β from a checkpoint
end of a step    updates β from the pairs of the step on all ranks
a log            names overfitting and collapse; stops beyond `edpo_max_kl`
"""

from collections.abc import Mapping
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from ..losses.beta_controller import BetaController
from ..reference.provider import Reference
from ..run_files import CONTROLLER, WARNINGS
from .health import HealthCheck
from .records import StepRecords

LOG = get_logger(__name__)


class EDPOCallback(TrainerCallback):
    """Updates β once per optimizer step.

    Args:
        controller: Holds β.
        reference: The run's reference.
        records: The run's records.
        health: Names overfitting and collapse.
    """

    def __init__(
        self,
        controller: BetaController,
        reference: Reference,
        records: StepRecords,
        health: HealthCheck,
    ):
        self._controller, self._reference = controller, reference
        self._records, self._health = records, health

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts with β₀, or with β of the checkpoint that the run resumes."""
        self._controller.reset()
        if state.global_step:
            self._restore(state.stateful_callbacks.get(CONTROLLER))
        self._health.begin(state.log_history)
        self._records.begin(state.global_step, state.is_local_process_zero)

    def on_step_end(self, args, state, control, **kwargs):
        """Updates β, unless the optimizer skipped its step."""
        self._records.metrics.add_step(self._controller.metrics())
        if self._records.step_was_skipped:
            self._controller.discard()
        else:
            self._controller.advance(self._records.counts.totals)
            self._reference.after_step()
        if args.sync_ref_model and not state.global_step % args.ref_model_sync_steps:
            self._controller.reference_moved(args.ref_model_mixup_alpha)

    def on_log(self, args, state, control, **kwargs):
        """Names overfitting and collapse; saves and stops beyond `edpo_max_kl`."""
        newest = state.log_history[-1]
        if found := self._health.find(state.log_history):
            newest[WARNINGS] = found
        for line in found.values():
            LOG.warning(line)
        if self._health.stops(newest):
            control.should_save = control.should_training_stop = True

    def saved_state(self) -> dict[str, Any]:
        """β and the tokens seen so far, as JSON values for a checkpoint."""
        return {
            **self._controller.state_dict(),
            "num_tokens": self._records.metrics.tokens,
        }

    def _restore(self, saved: Mapping[str, Any] | None) -> None:
        """Restores a `saved_state`; warns if the checkpoint has none."""
        if saved is None:
            LOG.warning(
                "The checkpoint holds no ε-DPO state (was it trained with `rl: dpo`?): "
                f"continuing with `beta: {self._controller.beta}` of the recipe."
            )
            return
        self._records.metrics.tokens = saved.get("num_tokens", 0)
        for difference in self._controller.load_state_dict(saved):
            LOG.warning(
                f"Resuming ε-DPO: {difference}. Continuing from "
                f"β = {self._controller.beta} with the recipe's settings."
            )
