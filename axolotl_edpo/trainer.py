"""`EDPOTrainer`: from a batch of pairs to the ε-DPO loss.

    batcher → reference → scorer → pair_outcomes → mean over the step

Each part is an attribute and has its own file. axolotl, TRL and transformers load the
model and the data, evaluate and save. Where they offer no hook, a method is overridden
here and calls super(). `EDPOCallback` does what happens once per run or step.
"""

from functools import partial
from pathlib import Path
from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from . import distributed, upstream
from .data import checks
from .data.collator import trl_collator
from .data.layout import release_masks
from .losses.beta_controller import BetaController, make_controller
from .losses.preference import PreferenceLoss
from .models.completion_forward import CompletionForward
from .models.start import resolve_reference_adapter, starting_models
from .reference.provider import Reference
from .run_files import CONTROLLER
from .training import assembly, checkpointing, finite_checks
from .training.batching import PairBatcher
from .training.citation import PAPER
from .training.margin_filter import MarginFilter
from .training.metrics import Mode
from .training.pair_outcomes import MeanOverStep, pair_outcomes
from .training.records import StepRecords
from .training.scoring import PairScorer
from .training.settings import EDPOSettings


class EDPOTrainer(AxolotlDPOTrainer):
    """DPO in which every pair has its own KL penalty (arXiv 2502.13177).

    Args:
        model: The policy.
        ref_model: The reference; None if it is no separate model.
        args: axolotl's AxolotlDPOConfig, which has all fields of TRL's DPOConfig.
        settings: What TRL's arguments lack; by default, from the recipe that runs.
        **kwargs: Further arguments of AxolotlDPOTrainer.

    Raises:
        ValueError: If `args` is another config, or settings and recipe are missing.
    """

    controller: BetaController  # β
    loss: PreferenceLoss  # the loss of a pair
    batcher: PairBatcher  # pairs of a step, laid out in micro-batches
    forward: CompletionForward  # runs models up to the head
    reference: Reference  # computed, or read from disk
    scorer: PairScorer  # policy and reference, compared token by token
    margin_filter: MarginFilter | None  # β-DPO: which pairs count
    mean: MeanOverStep  # a micro-batch's share of the step's loss
    records: StepRecords  # what is logged, traced and counted of pairs

    _name, _paper = "ε-DPO", PAPER
    _tag_names, tag_names = ["trl", "dpo", "edpo"], ["axolotl", "dpo", "edpo"]

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        peft_config=None,
        settings: EDPOSettings | None = None,
        **kwargs,
    ):
        settings = assembly.make_settings(args, settings)
        self.loss = loss = assembly.make_loss(args, settings)
        models = starting_models(model, ref_model, peft_config, settings.models, loss)
        self.ref_model: Any = models.reference  # is sharded within super()
        kwargs |= {"args": args, "data_collator": trl_collator(args, data_collator)}
        kwargs |= {"peft_config": models.peft_config}
        with upstream.reference_of_trl(loss.has_reference):
            super().__init__(models.policy, models.reference, **kwargs)
        if settings.models.adapter_dir:
            keeps = loss.has_reference and peft_config is not None
            resolve_reference_adapter(self.model, keeps)
        assembly.set_up(self)
        self._make_parts(settings)

    def _make_parts(self, settings: EDPOSettings) -> None:
        self.controller = controller = make_controller(settings.controller)
        self.forward = forward = CompletionForward(self.accelerator)
        reference = assembly.make_reference(self, forward, settings.cache, self.loss)
        scorer = assembly.make_scorer(self, forward, reference, controller, self.loss)
        self.mean = assembly.make_mean(self, self.loss)
        records = assembly.make_records(self, settings, controller, self.mean)
        self.reference, self.scorer, self.records = reference, scorer, records
        self.batcher = assembly.make_batcher(self, settings.layout)
        self.margin_filter = assembly.make_margin_filter(
            self, controller, scorer, self.loss, records.finite
        )
        self._callback = assembly.make_callback(self, settings)
        self.add_callback(self._callback)
        self._is_prepared = False

    def create_accelerator_and_postprocess(self):
        """Also shards the reference, and keeps `torch_compile` for single layers."""
        super().create_accelerator_and_postprocess()
        upstream.restore_engine(self.accelerator)
        if self.is_fsdp_enabled:
            distributed.keep_float32(self.accelerator)
            if self.ref_model is not None:
                self.ref_model = distributed.shard(self.accelerator, self.ref_model)
        self._compile = upstream.take_compile_options(self.accelerator)

    def prepare(self, model) -> None:
        """Before the first batch, once: probes the policy, fills the reference's cache.

        Args:
            model: The policy, wrapped by its engine.

        Raises:
            ValueError: If the model does not do what the recipe asks for.
        """
        if not self._is_prepared:
            assembly.prepare(self, model, self._compile)
            self._is_prepared = True

    # --- batches ---------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Checks the pairs, and reports how many `sequence_len` cuts or drops."""
        pairs = checks.preference_columns(dataset)
        done = super()._prepare_dataset(pairs, processing_class, args, dataset_name)
        checks.check_prepared(dataset_name, dataset, done, args.max_length)
        return done

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, laid out, and their counts.

        Returns:
            This rank's batches, and a tensor of shape (2,): pairs of the step and
            tokens of their chosen answers, on all ranks.
        """
        if not self._is_prepared:
            self.model_wrapped.train()  # some CPUs switch 4-bit kernels in evaluation
            self.prepare(self.model_wrapped)
        read = partial(super().get_batch_samples, device=device)
        has_next = self.state.global_step + 1 < self.state.max_steps
        batches = self.batcher.step(epoch_iterator, num_batches, read, has_next)
        if not batches:
            return batches, None
        counts = self.batcher.count(batches)
        self.records.metrics.add_tokens(counts[2])
        self.reference.begin_step(batches, self.optimizer)
        if self.margin_filter is not None:
            policy, done = self.model_wrapped, self.state.global_step
            self.margin_filter.look_ahead(policy, batches, self._prepare_inputs, done)
        return batches, counts[:2].clamp(min=1)  # both are divisors

    def _prepare_inputs(self, inputs):
        """Copies tensors to the device without waiting for it."""
        return super()._prepare_inputs(self.batcher.to_device(inputs))

    def _get_num_items_in_batch(self, batch_samples, device) -> None:
        """Counts nothing, as `get_batch_samples` counts."""

    def training_step(self, model, inputs, *args, **kwargs):
        """Skips axolotl's override: it empties the GPU cache at every micro-batch."""
        step = super(AxolotlDPOTrainer, self).training_step
        loss = step(model, inputs, *args, **kwargs)
        release_masks(inputs)
        return loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Lays out a batch of an evaluation, then runs it."""
        self.prepare(model)
        batch = self.batcher.evaluation_batch(inputs)
        self.reference.prefetch([batch])
        return super().prediction_step(model, batch, *args, **kwargs)

    # --- loss ------------------------------------------------------------------------

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        """A micro-batch's share of the mean loss over the pairs of its step.

        Args:
            model: The policy, wrapped by its engine.
            inputs: A `Batch` on the run's device.
            return_outputs: Refused, as no logits are kept.
            num_items_in_batch: Counts of `get_batch_samples`; None in evaluation.

        Raises:
            Diverged, WrongStart: If the step cannot be trained on; see `StepRecords`.
        """
        if return_outputs:
            raise ValueError("`rl: edpo` keeps no logits that it could return")
        stats, router_loss = self.scorer(model, inputs)
        weights = None
        if self.margin_filter is not None and self._mode == "train":
            weights = self.margin_filter.weights(inputs, stats, self.state.global_step)
        lengths, step = inputs["lengths"], self.state.global_step + 1
        pairs = pair_outcomes(stats, lengths, self.controller, self.loss, weights)
        self.records.add(self._mode, step, inputs, stats, pairs, router_loss)
        return self.mean(pairs, inputs, num_items_in_batch, router_loss)

    @property
    def _mode(self) -> Mode:
        return "train" if self.model.training else "eval"

    def _get_grad_norm(self, model, grad_norm=None):
        """Stops a run whose gradient is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        deepspeed = self.is_deepspeed_enabled
        if finite_checks.gradient_is_broken(self.accelerator, model, norm, deepspeed):
            step, beta = self.state.global_step + 1, self.controller.beta
            self.records.finite.stop("the gradient is", step, beta)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the means over everything since the last log."""
        sums = partial(distributed.sum_over_ranks, self.accelerator)
        means = self.records.metrics.pop(self._mode, sums, self.controller.beta)
        self._metrics[self._mode].update(means)
        super().log(logs, start_time)

    # --- runs and checkpoints --------------------------------------------------------

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trains. Refuses frozen models and checkpoints that cannot be resumed."""
        finite_checks.require_trainable(self.model)
        ranks = self.accelerator.num_processes if self.is_deepspeed_enabled else None
        checkpointing.require_resumable(resume_from_checkpoint, ranks)
        with self.batcher.reading_ahead(), self.records.flushed_at_end():
            return super().train(resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model, trial):
        """Also saves β, the reference of TR-DPO, and the trace so far."""
        folder = checkpointing.folder_of(self._get_output_dir(trial), self.state)
        moving, writes = assembly.moving_reference(self), self.args.should_save
        checkpointing.begin_save(folder, self.accelerator, writes, moving)
        self.records.flush()
        self.state.stateful_callbacks[CONTROLLER] = self._callback.saved_state()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        """Also waits until every rank has written its last file."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Also loads the reference of TR-DPO, and a schedule that DeepSpeed saved."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        moving = assembly.moving_reference(self)
        if moving is not None:
            checkpointing.load_reference(Path(checkpoint), moving)
        if not self.is_deepspeed_enabled:
            checkpointing.load_deepspeed_schedule(Path(checkpoint), self.lr_scheduler)
