"""Builds the parts of a run from TRL's trainer and the settings of the recipe."""

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .. import upstream
from ..data.collator import PairCollator, keep_examples
from ..data.image_collator import ImagePairCollator
from ..data.images import has_images, thumbnails
from ..data.layout import LayoutSettings
from ..distributed import RowGroup, data_ranks, row_group
from ..losses.beta_controller import BetaController, MarginController
from ..losses.preference import PreferenceLoss
from ..models.completion_forward import CompletionForward
from ..models.forward import causal_lm, compile_layers, disable_attention_dropout
from ..models.moe import has_router_loss
from ..models.packing_support import prepare_models, resolve_layout
from ..models.start import save_adapter_only
from ..reference.no_reference import NoReference
from ..reference.precompute import CacheSettings
from ..reference.provider import (
    AdapterReference,
    CachedReference,
    LiveReference,
    ModelReference,
    Reference,
)
from . import first_step
from .batching import PairBatcher
from .callbacks import EDPOCallback
from .finite_checks import FiniteCheck, refuse_broken_weights
from .first_step import FirstStep
from .health import HealthCheck
from .margin_filter import MarginFilter
from .metrics import PairMetrics
from .pair_outcomes import MeanOverStep
from .pair_trace import PairTrace
from .records import StepRecords
from .scoring import PairScorer
from .settings import EDPOSettings
from .step_counts import StepCounts


def all_models(trainer: Any) -> list[PreTrainedModel]:
    """The policy, and the reference if it is a separate model, without engines."""
    models = [causal_lm(trainer.model)]
    if trainer.ref_model is not None:
        models.append(trainer.accelerator.unwrap_model(trainer.ref_model))
    return models


def set_up(trainer: Any) -> None:
    """Adjusts what axolotl and TRL have set up: adapter, router loss, dropout, logging.

    Raises:
        ValueError: If the policy is a mixture of experts whose router loss cannot be
            computed.
    """
    if trainer.is_deepspeed_enabled:
        upstream.wait_for_every_gather()
    save_adapter_only(trainer.model)
    if trainer.aux_loss_enabled:
        trainer.aux_loss_enabled = has_router_loss(causal_lm(trainer.model))
    if trainer.args.disable_dropout:
        for model in all_models(trainer):
            disable_attention_dropout(model)
    upstream.leave_losses_as_they_are(trainer)
    if row_group(trainer.accelerator).size > 1:
        _refuse_router_loss(trainer)
        upstream.leave_rows_as_they_are(trainer)
    # the filter would wait for the device at every loss; `FiniteCheck` replaces it
    trainer.args.logging_nan_inf_filter = False


def _refuse_router_loss(trainer: Any) -> None:
    if trainer.aux_loss_enabled:
        raise ValueError(
            "`context_parallel_size` above 1 does not work with the router loss of a "
            "mixture of experts, a mean over whole rows: set `router_aux_loss_coef: 0` "
            "in the config of `base_model`"
        )


def make_settings(args: DPOConfig | None, given: EDPOSettings | None) -> EDPOSettings:
    """The settings of a run: those given, or those of the recipe that axolotl runs.

    Raises:
        ValueError: If `args` is no config of axolotl, or if there is no recipe.
    """
    if not isinstance(args, AxolotlDPOConfig):
        raise ValueError(
            f"`args` is a {type(args).__name__}: pass an AxolotlDPOConfig from "
            "axolotl.core.trainers.dpo.args, which has all fields of TRL's DPOConfig"
        )
    if given is not None:
        return given
    recipe = upstream.recipe_config()
    if recipe is None:
        raise ValueError(
            "`settings` is missing, and axolotl runs no recipe: pass "
            "EDPOSettings(ControllerSettings(beta=0.1, epsilon=0.01))"
        )
    return EDPOSettings.from_config(recipe, args.beta)


def make_loss(args: DPOConfig, settings: EDPOSettings) -> PreferenceLoss:
    """The preference loss of a recipe.

    Args:
        args: TRL's arguments.
        settings: Settings that TRL does not have.
    """
    return PreferenceLoss(
        tuple(args.loss_type),
        tuple(args.loss_weights or [1.0] * len(args.loss_type)),
        args.label_smoothing,
        args.use_weighting,
        1.0 if args.ld_alpha is None else args.ld_alpha,
        settings.length_penalty,
        settings.terms,
    )


def make_mean(trainer: Any, loss: PreferenceLoss) -> MeanOverStep:
    """Averages losses over the pairs of an optimizer step."""
    ranks, _ = data_ranks(trainer.accelerator)
    router_weight = trainer.router_aux_loss_coef if trainer.aux_loss_enabled else 0.0
    return MeanOverStep(ranks, loss.sft_weight, router_weight)


def make_batcher(trainer: Any, wanted: LayoutSettings) -> PairBatcher:
    """Replaces TRL's collator, and prepares the models for packed rows.

    Args:
        trainer: TRL's trainer.
        wanted: The layout that the recipe asks for.

    Raises:
        ValueError: If the models do not support this layout.
    """
    make_collator = _collator_maker(
        trainer.data_collator, row_group(trainer.accelerator)
    )
    trainer.data_collator = keep_examples
    args = trainer.args
    if has_images(trainer.train_dataset):
        layout = LayoutSettings(shares=False)
    else:
        layout = prepare_models(wanted, all_models(trainer))
    last = args.dataloader_drop_last
    return PairBatcher(trainer.accelerator, make_collator, layout, args.device, last)


def _collator_maker(collator: Any, group: RowGroup) -> Callable[..., Any]:
    """Makes our collator with the arguments of TRL's or axolotl's."""
    if isinstance(collator, DataCollatorForPreference):
        make = partial(PairCollator, **vars(collator))
        return partial(make, parts=group.size, part=group.rank)

    def with_images(*, packs: bool, shares: bool) -> ImagePairCollator:
        # a tokenizer cannot pad in two threads: an evaluation may lay out its batches
        # while the next step is laid out
        return ImagePairCollator(**copy.deepcopy(vars(collator)))

    return with_images


def make_reference(
    trainer: DPOTrainer,
    forward: CompletionForward,
    cache: CacheSettings | None,
    loss: PreferenceLoss,
) -> Reference:
    """A reference model, an adapter of the policy's model, a cache of either; or none.

    Args:
        trainer: TRL's trainer.
        forward: Runs models up to the head.
        cache: Settings of the cache; None: the reference runs for every batch.
        loss: The recipe's loss.
    """
    if not loss.has_reference:
        return NoReference(forward)
    live: LiveReference = AdapterReference(forward)
    if trainer.ref_model is not None:
        live = ModelReference(forward, trainer.ref_model)
    if cache is None:
        return live
    args: Any = trainer.args
    truncation = args.max_length, args.truncation_mode
    batch_size = args.per_device_train_batch_size
    return CachedReference(live, cache, loss, *truncation, batch_size)


def make_scorer(
    trainer: Any,
    forward: CompletionForward,
    reference: Reference,
    controller: BetaController,
    loss: PreferenceLoss,
) -> PairScorer:
    """Computes the statistics per token that controller and loss need."""
    return PairScorer(
        forward,
        reference,
        controller.epsilon,
        sum_sq_probs=loss.weighted,
        router_loss=trainer.aux_loss_enabled,
    )


def make_records(
    trainer: Any,
    settings: EDPOSettings,
    controller: BetaController,
    mean: MeanOverStep,
) -> StepRecords:
    """Builds what logs, traces and counts the pairs of a run.

    Args:
        trainer: TRL's trainer.
        settings: Say how often pairs are traced, and which sets are evaluated.
        controller: The run's controller of β.
        mean: Averages losses.
    """
    accelerator, output_dir = trainer.accelerator, Path(trainer.args.output_dir)
    perturbed, trace = controller.epsilon is not None, None
    if settings.log_pairs is not None:
        collator, every = trainer.data_collator, settings.log_pairs
        trace = make_trace(trainer, collator, output_dir, every, perturbed)
    counts = StepCounts(accelerator, controller, FiniteCheck(output_dir))
    metrics = PairMetrics(perturbed, mean, settings.sets)
    first = make_first_step(trainer, settings)
    return StepRecords(accelerator, metrics, counts, trace, first)


def make_trace(
    trainer: Any,
    collator: Any,
    folder: Path,
    every: int,
    perturbed: bool,
    more: Sequence[str] = (),
) -> PairTrace:
    """Writes a row per pair.

    Args:
        trainer: TRL's trainer.
        collator: The collator of the pairs, which knows how images are read.
        folder: Where the folder of the trace is made.
        every: One of so many optimizer steps is traced.
        perturbed: Whether ε-DPO computes a step s for each pair.
        more: Names of further columns.
    """
    decode = trainer.processing_class.batch_decode
    normalizer = getattr(collator, "normalizer", None)
    return PairTrace(
        folder,
        every,
        trainer.accelerator.process_index,
        perturbed=perturbed,
        decode=partial(decode, skip_special_tokens=True),
        thumbnails=normalizer and partial(thumbnails, normalizer),
        more=more,
    )


def make_first_step(trainer: Any, settings: EDPOSettings) -> FirstStep:
    """Compares policy and reference in the first step of a recipe.

    A reference that is an argument of the trainer may be any model. With dropout, both
    differ from the start. A loss may have no reference. So nothing is compared then.
    """
    accelerator, bound = trainer.accelerator, None
    compares = settings.models.from_recipe and trainer.loss.has_reference
    if compares and trainer.args.disable_dropout:
        exact = _is_float32(trainer)
        bound = first_step.FLOAT32_BOUND if exact else first_step.ROUNDED_BOUND
    engine = accelerator.state.deepspeed_plugin
    remedies = [first_step.AGAIN]
    if engine is not None and engine.zero_stage == 3:
        remedies.append(first_step.ZERO3)
    if settings.cache is not None:
        remedies.append(first_step.CACHE)
    return FirstStep(accelerator, bound, [*remedies, first_step.PLUGINS])


def _is_float32(trainer: Any) -> bool:
    """Whether products are in float32: no weight and no operand is rounded further."""
    dtypes = {weight.dtype for weight in trainer.model.parameters()}
    mixed = trainer.accelerator.mixed_precision != "no"
    return dtypes == {torch.float32} and not (mixed or trainer.args.tf32)


def make_callback(trainer: Any, settings: EDPOSettings) -> EDPOCallback:
    """Builds what happens once per run and step, when the trainer has its parts."""
    health = HealthCheck(settings.max_kl, trainer.loss.has_reference)
    parts = trainer.controller, trainer.reference, trainer.records
    return EDPOCallback(*parts, health)


def make_margin_filter(
    trainer: DPOTrainer,
    controller: BetaController,
    scorer: PairScorer,
    loss: PreferenceLoss,
    finite: FiniteCheck,
) -> MarginFilter | None:
    """The filter of `edpo_control: batch_margin` (β-DPO); else None."""
    if not isinstance(controller, MarginController):
        return None
    seed = trainer.args.seed
    return MarginFilter(controller, scorer, loss, trainer.accelerator, finite, seed)


def moving_reference(trainer: Any) -> PreTrainedModel | None:
    """The reference of TR-DPO, which follows the policy, without engine; or None."""
    return all_models(trainer)[1] if trainer.args.sync_ref_model else None


def prepare(
    trainer: Any, policy: nn.Module, compile_options: Mapping[str, Any]
) -> None:
    """Before the first batch: probes the policy, chooses the layout, fills the cache.

    Args:
        trainer: The `EDPOTrainer`.
        policy: The policy, wrapped by its engine.
        compile_options: Keywords of `torch.compile` for layers; empty: no compilation.

    Raises:
        ValueError: If the model does not do what the recipe asks for.
    """
    forward, batcher = trainer.forward, trainer.batcher
    refuse_broken_weights(trainer.accelerator, policy)
    forward.probe(policy)
    resolve = partial(resolve_layout, batcher.layout, forward.group)
    batcher.use(forward.ask(policy, resolve))
    if compile_options:
        _compile_models(trainer, compile_options)
    if isinstance(trainer.reference, CachedReference):
        fill_cache(trainer, trainer.reference, policy)


def _compile_models(trainer: Any, options: Mapping[str, Any]) -> None:
    """In a function, so that no variable keeps a reference that is released later."""
    for model in all_models(trainer):
        compile_layers(model.base_model, options)


def fill_cache(trainer: Any, reference: CachedReference, policy: nn.Module) -> None:
    """Fills the cache with all pairs of the recipe, then drops the reference model.

    An untrained policy equals the reference. The policy is untrained in step 0 of a
    run, and in an evaluation without an adapter.

    Args:
        trainer: The `EDPOTrainer`.
        reference: The reference whose cache is filled.
        policy: The policy, wrapped by its engine.
    """
    evaluation = trainer.eval_dataset
    eval_sets = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    every_set = (trainer.train_dataset, *eval_sets)
    data = [dataset for dataset in every_set if dataset is not None]
    unwrapped = trainer.accelerator.unwrap_model(policy)
    untrained = not isinstance(unwrapped, PeftModel)
    if trainer.is_in_train:
        untrained = trainer.state.global_step == 0
    collator, to_device = trainer.batcher.collators["train"], trainer.batcher.to_device
    reference.fill(
        policy, data, lambda pairs: to_device(collator(pairs)), is_new=untrained
    )
    trainer.ref_model = None  # the cache replaces it
    gc.collect()  # modules hold reference cycles
