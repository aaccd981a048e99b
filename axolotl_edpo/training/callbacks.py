"""`PairRun`: what a run carries from one optimizer step to the next.

β            moves once per step, by the pairs of that step on all ranks
the trace    what pairs did, written with each checkpoint and when the run ends
checkpoints  hold β, the tokens so far and a reference that moves; they count when
             every rank has written its part
the stop     where losses or gradients are not finite
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..losses.beta_controller import BetaController, ControllerSettings, controller_of
from ..reference.provider import PairReference
from ..run_files import CONTROLLER
from . import checkpointing as checkpoint
from . import finite_checks as guard
from .pair_trace import PairTrace

LOG = get_logger(__name__)


class BetaCallback(TrainerCallback):
    """Tells the trainer's controller where optimizer steps and runs begin and end."""

    def __init__(self, trainer: "PairRun"):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes β from the checkpoint that was loaded, or starts anew."""
        self._trainer.restore_beta(resumed=state.global_step > 0)
        self._trainer.begin_trace()

    def on_step_end(self, args, state, control, **kwargs):
        """Moves β, unless the optimizer skipped its step."""
        self._trainer.advance_beta()


class PairRun(PairReference):
    """The trainer's state.

    Attributes:
        controller: Holds β.
        trace: What pairs did, where the recipe asks for it.
    """

    controller: BetaController
    trace: PairTrace | None = None
    _broken_pairs: Any = 0
    _observed: Sequence[int] = ()

    def _start_run(self, settings: ControllerSettings, traced: int | None) -> None:
        self.controller = controller_of(settings)
        if traced is not None:
            tokenizer: Any = self.processing_class
            self.trace = PairTrace(
                Path(self.args.output_dir),
                traced,
                self.accelerator.process_index,
                perturbed=self.controller.epsilon is not None,
                decode=partial(tokenizer.batch_decode, skip_special_tokens=True),
            )
        self.add_callback(BetaCallback(self))

    def begin_trace(self) -> None:
        """At the start of a run: what comes after its first step does not count."""
        if self.trace is not None:
            if self.is_local_process_zero():
                self.trace.drop_after(self.state.global_step)
            self.accelerator.wait_for_everyone()  # none writes before

    def restore_beta(self, resumed: bool) -> None:
        """At the start of a run: β of the checkpoint, or β₀.

        Args:
            resumed: Whether the run continues from a checkpoint.
        """
        self.controller.reset()
        if not resumed:
            return
        state = self.state.stateful_callbacks.get(CONTROLLER)
        if state is None:
            LOG.warning(
                "The checkpoint holds no ε-DPO state (was it trained with `rl: dpo`?): "
                f"continuing with `beta: {self.controller.beta}` of the recipe."
            )
            return
        self._total_train_tokens = state.get("num_tokens", 0)
        for difference in self.controller.load_state_dict(state):
            LOG.warning(
                f"Resuming ε-DPO: {difference}. Continuing from "
                f"β = {self.controller.beta} with the recipe's settings."
            )

    def advance_beta(self) -> None:
        """At the end of an optimizer step: β moves by the pairs of that step."""
        for name, value in self.controller.metrics().items():
            self._metrics["train"][name].append(value)
        if self.accelerator.optimizer_step_was_skipped:
            self.controller.discard()
        else:
            self.controller.advance(self._observed)
            self.stepped()
        args = self.args
        if (
            args.sync_ref_model
            and not self.state.global_step % args.ref_model_sync_steps
        ):
            self.controller.reference_moved(args.ref_model_mixup_alpha)

    def _save_checkpoint(self, model, trial):
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder, writes = Path(self._get_output_dir(trial)) / name, self.args.should_save
        if writes:
            checkpoint.mark_incomplete(folder)
        self.accelerator.wait_for_everyone()  # none writes before it is marked
        if self.args.sync_ref_model:
            checkpoint.save_reference(folder, self._own_reference(), writes)
        if self.trace is not None:
            self.trace.flush()
        self._count_tokens()
        tokens = {"num_tokens": self._total_train_tokens}
        state = self.controller.state_dict() | tokens
        self.state.stateful_callbacks[CONTROLLER] = state
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        """As transformers'; returns when every rank has written its last file."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, resumed):
        """As transformers'; also loads a reference that moves.

        Where DeepSpeed kept the optimizer, starts a new one.
        """
        super()._load_optimizer_and_scheduler(resumed)
        if resumed is None:
            return
        folder = Path(resumed)
        if self.args.sync_ref_model:
            checkpoint.load_reference(folder, self._own_reference())
        if self.is_deepspeed_enabled:
            return
        if any(folder.glob("global_step*")):
            LOG.warning(
                f"{folder} was saved by another engine: weights, β and learning rate "
                "are those of the checkpoint, the optimizer starts anew. To continue "
                "with it, use the same `deepspeed:` and as many ranks."
            )
            if (schedule := folder / SCHEDULER_NAME).exists():
                state = torch.load(schedule, weights_only=True)
                self.lr_scheduler.load_state_dict(state)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As transformers', but refuses what it could not go on from, or not train."""
        guard.require_trainable(self.model)
        if isinstance(resume_from_checkpoint, str | Path):
            checkpoint.require_complete(Path(resume_from_checkpoint))
            if self.is_deepspeed_enabled:
                ranks = self.accelerator.num_processes
                checkpoint.require_ranks(Path(resume_from_checkpoint), ranks)
        try:
            done = super().train(
                resume_from_checkpoint=resume_from_checkpoint, **kwargs
            )
        except BaseException:
            self._save_trace_of_failed_run()
            raise
        if self.trace is not None:
            self.trace.flush()
        return done

    def _save_trace_of_failed_run(self) -> None:
        """The error of the run is told, whatever becomes of the trace."""
        if self.trace is None:
            return
        try:
            self.trace.flush()
        except Exception as error:
            LOG.warning(f"{self.trace.folder}: the last steps are not in it: {error}")

    def _observe(self, steps: torch.Tensor, losses: torch.Tensor) -> None:
        """Counts on the device; all ranks sum up once per optimizer step.

        Args:
            steps: Shape (pairs,), int64, values in {-1, 0, +1}.
            losses: Shape (pairs,).

        Raises:
            Diverged: Where a loss is not finite, before the last backward of the step.
        """
        self.controller.observe(steps)
        self._broken_pairs += (~losses.isfinite()).sum()
        if not self.accelerator.sync_gradients:
            return
        counts = torch.stack([self._broken_pairs, *self.controller.observed()])
        broken, *self._observed = self._sum_over_ranks(counts).tolist()
        self._broken_pairs = 0
        if broken:
            self._stop(f"the loss of {broken} of the step's pairs is")

    def _get_grad_norm(self, model, grad_norm=None):
        """Stops a run whose gradient is not finite.

        DeepSpeed's optimizer has run by now. Up to 0.18 it took such a gradient, and
        its norm does not say so: the weights do. From 0.19 on it skips the step, and
        the norm says so, on every rank alike.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        taken = self.is_deepspeed_enabled and self._weights_hold_nan(model)
        # under fp16 it is no error: the step is skipped, and the scale falls
        scaled = self.accelerator.scaler or self.accelerator.mixed_precision == "fp16"
        if taken or not (scaled or norm is None) and guard.not_finite(norm):
            self._stop("the gradient is")
        return norm

    def _weights_hold_nan(self, model) -> bool:
        """Whether a weight that trains does, on any rank."""
        weights = self.accelerator.unwrap_model(model).parameters()
        trained = [weight for weight in weights if weight.requires_grad]
        flags = guard.nan_flags(trained, self.accelerator.device)
        return int(self._sum_over_ranks(flags.sum())) > 0

    def _stop(self, what: str) -> None:
        step, beta = self.state.global_step + 1, self.controller.beta
        raise guard.diverged(what, step, beta, Path(self.args.output_dir))

    def _count_tokens(self) -> None:
        self._total_train_tokens += int(self._new_tokens)
        self._new_tokens = 0
