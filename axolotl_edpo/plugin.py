"""What axolotl calls: `register` lowers `rl: edpo` to what axolotl knows.

axolotl's `rl` is a closed list that its data loading, model loading and validators
branch on. ε-DPO wants all of them to do what they do for DPO, so the recipe is lowered
before validation:

    rl: edpo               →   rl: dpo
    beta: 0.01             →   rl_beta: 0.01
    sample_packing: true   →   edpo_sample_packing: true
    dpo_use_liger_kernel: …    nothing: the head takes the place of Liger's loss
                               trainer_cls: axolotl_edpo.trainer.EDPOTrainer

Lowering a lowered recipe changes nothing: Ray workers load a config twice.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from .config.versions import check_versions

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.logging import get_logger
except ImportError:
    check_versions()  # says more, and axolotl does not swallow it
    raise

from .config.args import LIGER, LOWERED, PREFIX, EDPOArgs, handed_on, lowered_packing
from .config.typos import check_command_line, misspelt
from .config.validate import (
    check_foreign_recipe,
    check_recipe,
    check_without_gpu,
    without_effect,
)
from .upstream import automatic_plugins, dropped_words, named_plugins

LOG = get_logger(__name__)

PLUGIN = "axolotl_edpo.EDPOPlugin"
TRAINER = "axolotl_edpo.trainer.EDPOTrainer"


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
            RuntimeError: If axolotl or TRL is missing or outside the tested range.
        """
        self._active = cfg.get("rl") == "edpo" or cfg.get("trainer_cls") == TRAINER
        ours = EDPOArgs.model_fields if self._active else ()
        check_command_line(dropped_words(), ours)
        if not self._active:
            if not cfg.get("inference"):  # there axolotl takes `rl` away itself
                check_foreign_recipe(cfg)
            return
        check_versions()
        _check_registration(cfg)
        beta = check_recipe(cfg)
        if cfg["rl"] == "edpo":  # not lowered yet, and only what the user wrote
            for line in [*misspelt(cfg, _known_keys()), *without_effect(cfg)]:
                LOG.warning(line)
        cfg.update(rl="dpo", trainer_cls=TRAINER, **lowered_packing(cfg))
        absent = [
            key for key in cfg if str(key).startswith(PREFIX) and cfg[key] is None
        ]
        lowered = [key for key in LOWERED if cfg.get(key) is not None]
        for key in [*lowered, *absent]:
            del cfg[key]
        if cfg.pop(LIGER, None):
            LOG.info(f"`{LIGER}`: this head takes the place of Liger's loss.")
        if beta is not None:
            cfg.update(beta=beta, rl_beta=beta)

    def get_input_args(self) -> str | None:
        """The options that axolotl's config takes in addition."""
        return "axolotl_edpo.config.args.EDPOArgs" if self._active else None

    def get_training_args(self, cfg) -> dict:
        """What TRL and transformers are told otherwise than the recipe says.

        TRL 1.9 switches its own `padding_free` off with a warning; rows are laid by
        `PairCollator`. What it precomputes are two numbers per pair; `PairReference`
        caches more. axolotl does not hand on all that TRL takes. And a recipe with
        `bf16: true` may run without an accelerator.
        """
        if cfg.trainer_cls != TRAINER:
            return {}
        ours = {"padding_free": False, "precompute_ref_log_probs": False}
        told: dict = {**ours, **handed_on(cfg)}
        return told if _has_accelerator() else told | {"use_cpu": True}

    def load_datasets(self, cfg, preprocess: bool = False):
        """As axolotl's; what is wrong with the data is said before a model loads.

        `axolotl preprocess` is left alone: it shows rows on demand.
        """
        if preprocess or cfg.trainer_cls != TRAINER:
            return None
        from .data.checks import load

        return load(cfg)

    def pre_model_load(self, cfg) -> None:
        """Refuses what this machine or this model cannot do.

        Then sets the seed: what is drawn while a model is loaded (an adapter, rows for
        new tokens) is the same for policy and reference, on every rank, in every run.
        """
        if cfg.trainer_cls == TRAINER:
            from transformers import set_seed

            from .models.packing_support import check_recipe_model

            if not (cfg.merge_lora or _has_accelerator()):
                check_without_gpu(cfg)
            check_recipe_model(cfg)
            set_seed(42 if cfg.seed is None else cfg.seed)  # 42: transformers'

    def add_callbacks_post_trainer(self, cfg, trainer) -> list:
        """What ends a run early, which axolotl adds to supervised training only."""
        callbacks: list = []
        if cfg.trainer_cls != TRAINER:
            return callbacks
        if cfg.early_stopping_patience:
            from transformers import EarlyStoppingCallback

            callbacks.append(EarlyStoppingCallback(cfg.early_stopping_patience))
        if cfg.loss_watchdog_threshold is not None:
            from axolotl.utils.callbacks import LossWatchDogCallback

            callbacks.append(LossWatchDogCallback(cfg))
        return callbacks

    def post_trainer_create(self, cfg, trainer) -> None:
        """Points auto-resume at the newest checkpoint whose save came to its end.

        And keeps an adapter in float32 for `lora_fp32_gradients`: axolotl looks for one
        in the model that it loads, and the trainer of preferences adds it later.
        """
        if cfg.trainer_cls != TRAINER:
            return
        if cfg.auto_resume_from_checkpoints:
            from .training.checkpointing import choose_auto_resume

            choose_auto_resume(cfg)
        if cfg.lora_fp32_gradients and not cfg.deepspeed:
            from axolotl.utils.lora_precision import upcast_lora_parameters

            upcast_lora_parameters(trainer.model)

    def post_train(self, cfg, model) -> None:
        """Names the weights of an adapter as PEFT reads them; see `name_as_peft`."""
        sharded = cfg.trainer_cls == TRAINER and cfg.adapter and cfg.fsdp_config
        if sharded and os.environ.get("RANK", "0") == "0":
            from .training.checkpointing import name_as_peft

            name_as_peft(Path(cfg.output_dir))


def _check_registration(cfg: Mapping) -> None:
    if PLUGIN not in {*named_plugins(cfg), *automatic_plugins()}:
        raise ValueError(
            f"`rl: edpo` needs `plugins: [{PLUGIN}]` in this recipe: only from 0.21 on "
            "axolotl finds an installed plugin by itself"
        )
    if cfg.get("trainer_cls") not in (None, TRAINER):
        raise ValueError(
            f"`trainer_cls: {cfg['trainer_cls']}` would replace the trainer of "
            "`rl: edpo`: remove it"
        )


def _known_keys() -> set[str]:
    """The keys of axolotl and of the plugins of this recipe."""
    from axolotl.integrations.config import merge_input_args

    fields = merge_input_args()[1].model_fields
    return {*fields, *(field.alias for field in fields.values() if field.alias)}


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
