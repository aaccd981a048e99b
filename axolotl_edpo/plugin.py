"""The hooks that axolotl calls: `register` rewrites `rl: edpo` as `rl: dpo`.

axolotl accepts only the values of `rl` that it knows. Its data loading, model loading
and validation branch on them. For ε-DPO they have to do what they do for DPO. So the
recipe is lowered (rewritten in axolotl's keys) before axolotl validates it:

    rl: edpo               →   rl: dpo
    beta: 0.01             →   rl_beta: 0.01
    sample_packing: true   →   edpo_sample_packing: true
    dpo_use_liger_kernel: …    removed: our fused op replaces Liger's loss
    (new)                      trainer_cls: axolotl_edpo.trainer.EDPOTrainer

Ray workers load a config twice. So lowering a lowered recipe changes nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from .config.versions import check_versions

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.logging import get_logger
except ImportError:
    check_versions()  # its RuntimeError says more; axolotl would ignore an ImportError
    raise

from .config.args import LIGER, LOWERED, PREFIX, EDPOArgs, handed_on, lowered_packing
from .config.context_rules import check_ranks
from .config.typos import check_command_line, misspelt
from .config.validate import (
    check_foreign_recipe,
    check_recipe,
    check_without_gpu,
    without_effect,
)
from .errors import quote
from .losses.reference_free import reference_free
from .upstream import (
    automatic_plugins,
    dropped_words,
    keep_adapter_in_float32,
    load_reference_if,
    loss_watchdog,
    named_plugins,
    recipe_keys,
    wait_for_every_gather,
)
from .upstream_data import prepare_pairs_with

LOG = get_logger(__name__)

PLUGIN = "axolotl_edpo.EDPOPlugin"
TRAINER = "axolotl_edpo.trainer.EDPOTrainer"
# The seed of a recipe without `seed:`; transformers has the same default.
DEFAULT_SEED = 42


class EDPOPlugin(BasePlugin):
    """Adds `rl: edpo` to axolotl; recipes of any other `rl` are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self._active = False

    def register(self, cfg: dict) -> None:
        """Checks the recipe and lowers it.

        Args:
            cfg: The YAML with command-line overrides, before validation.

        Raises:
            ValueError: If the recipe would not train as written.
            RuntimeError: If axolotl or TRL is missing, or is an untested release.
        """
        self._active = cfg.get("rl") == "edpo" or cfg.get("trainer_cls") == TRAINER
        check_command_line(
            dropped_words(), EDPOArgs.model_fields if self._active else ()
        )
        if self._active:
            check_versions()
            _check_registration(cfg)
            beta = check_recipe(cfg)
            if cfg.get("merge_lora"):
                from .models.merging import check_merge

                check_merge(cfg)
            _warn(cfg)
            _lower(cfg, beta)
            prepare_pairs_with(_prepare, lambda cfg: cfg.trainer_cls == TRAINER)
        elif not cfg.get("inference"):  # axolotl removes `rl` for inference
            check_foreign_recipe(cfg)

    def get_input_args(self) -> str | None:
        """The class of our options, for axolotl to add to its config."""
        return "axolotl_edpo.config.args.EDPOArgs" if self._active else None

    def get_training_args(self, cfg) -> dict:
        """The training arguments that override those that axolotl sets.

        - `padding_free` is off: `PairCollator` lays out the rows, and TRL 1.9 would
          switch it off with a warning.
        - `precompute_ref_log_probs` is off: TRL would add log-probabilities to the data
          sets, but `CachedReference` keeps what the run needs, once for all runs.
        - `handed_on` adds the options that axolotl does not pass to TRL.
        - `use_cpu` is on without an accelerator: `bf16: true` needs it there.
        """
        if cfg.trainer_cls != TRAINER:
            return {}
        arguments = {"padding_free": False, "precompute_ref_log_probs": False}
        arguments |= handed_on(cfg)
        if cfg.is_multimodal or cfg.test_datasets:
            # TRL would remove the tokens of pairs with images, and numbers of sets
            arguments["remove_unused_columns"] = False
        return arguments if _has_accelerator() else arguments | {"use_cpu": True}

    def pre_model_load(self, cfg) -> None:
        """Refuses what this machine or this model cannot do, and sets the seed.

        It also keeps axolotl from loading a reference for a loss that has none.
        DeepSpeed gathers weights while a model is loaded, on CPU ranks one by one.
        Loading a model may draw random weights: an adapter, embeddings of new tokens.
        With the seed set, they are equal on every rank and in every run.

        Raises:
            ValueError: Names the key, its value and what to set.
        """
        if cfg.trainer_cls != TRAINER:
            return
        from transformers import set_seed

        from .models.attached_kernels import check_activation
        from .models.merging import check_recipe_adapter
        from .models.packing_support import check_recipe_model, check_recipe_rows

        if not (cfg.merge_lora or _has_accelerator()):
            check_without_gpu(cfg)
        check_activation(cfg)
        check_ranks(cfg)
        check_recipe_model(cfg)
        check_recipe_rows(cfg)
        check_recipe_adapter(cfg)
        if cfg.deepspeed:
            wait_for_every_gather()
        if not _has_reference(cfg):
            load_reference_if(_has_reference)
        set_seed(DEFAULT_SEED if cfg.seed is None else cfg.seed)

    def add_callbacks_post_trainer(self, cfg, trainer) -> list:
        """The callbacks of options that axolotl applies to supervised training only.

        axolotl calls this, in training and in evaluation, right after it has attached
        LoRA kernels. So they are checked here.

        Raises:
            ValueError: If a kernel does not compute what the recipe asks for.
        """
        callbacks: list = []
        if cfg.trainer_cls != TRAINER:
            return callbacks
        from .models.attached_kernels import check_attached

        check_attached(cfg, trainer.model)
        if cfg.early_stopping_patience:
            from transformers import EarlyStoppingCallback

            callbacks.append(EarlyStoppingCallback(cfg.early_stopping_patience))
        if cfg.loss_watchdog_threshold is not None:
            callbacks.append(loss_watchdog(cfg))
        return callbacks

    def post_trainer_create(self, cfg, trainer) -> None:
        """Chooses the checkpoint of auto-resume, and casts an adapter to float32.

        Auto-resume continues from the newest checkpoint that is complete. axolotl
        applies `lora_fp32_gradients` when it loads the model. The adapter does not
        exist then, as TRL's trainer adds it later. So it is cast here.

        Raises:
            ValueError: If the ranks do not find the same checkpoint.
        """
        if cfg.trainer_cls != TRAINER:
            return
        if cfg.auto_resume_from_checkpoints:
            from .training.checkpointing import choose_auto_resume

            choose_auto_resume(cfg)
        if cfg.lora_fp32_gradients and not cfg.deepspeed:
            keep_adapter_in_float32(trainer.model)

    def post_train(self, cfg, model) -> None:
        """Renames the weights of a saved adapter for PEFT; see `name_as_peft`."""
        sharded = cfg.trainer_cls == TRAINER and cfg.adapter and cfg.fsdp_config
        if sharded and os.environ.get("RANK", "0") == "0":
            from .training.checkpointing import name_as_peft

            name_as_peft(Path(cfg.output_dir))


def _prepare(load, cfg, tokenizer):
    """Prepares pairs; see `data/preparation.py`, which imports much.

    axolotl then divides by the pairs of a step, which are none with too few ranks, and
    makes its mesh of ranks before `pre_model_load`. `axolotl preprocess` may prepare
    pairs in one process for a run of several.
    """
    from .data.preparation import prepare

    if not cfg.is_preprocess:
        check_ranks(cfg)

    return prepare(load, cfg, tokenizer)


def _check_registration(cfg: Mapping) -> None:
    if PLUGIN not in {*named_plugins(cfg), *automatic_plugins()}:
        raise ValueError(
            f"`rl: edpo` needs `plugins: [{PLUGIN}]` in this recipe: only from 0.21 on "
            "axolotl finds an installed plugin by itself"
        )
    trainer = cfg.get("trainer_cls")
    if trainer not in (None, TRAINER):
        raise ValueError(
            f"{quote('trainer_cls', trainer)} would replace the trainer of `rl: edpo`: "
            "remove it"
        )


def _warn(cfg: Mapping) -> None:
    """Warns of keys without effect.

    A lowered recipe gets no warnings: it has keys that the user did not write.
    """
    if cfg["rl"] == "edpo":
        for line in [*misspelt(cfg, recipe_keys()), *without_effect(cfg)]:
            LOG.warning(line)


def _lower(cfg: dict, beta: float | None) -> None:
    """Lowers the recipe in place; see the head of this file.

    Args:
        cfg: The recipe, checked.
        beta: β₀, or None if the recipe sets none: TRL's default then holds.
    """
    cfg.update(rl="dpo", trainer_cls=TRAINER, **lowered_packing(cfg))
    for key in [*cfg]:
        empty = str(key).startswith(PREFIX) and cfg[key] is None
        if empty or key in LOWERED and cfg[key] is not None:
            del cfg[key]
    if cfg.pop(LIGER, None):
        LOG.info(f"`{LIGER}`: this head takes the place of Liger's loss.")
    if beta is not None:
        cfg.update(beta=beta, rl_beta=beta)


def _has_reference(cfg) -> bool:
    return cfg.trainer_cls != TRAINER or reference_free(cfg.dpo_loss_type) is None


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
