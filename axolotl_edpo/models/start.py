"""Decides which models and adapters are policy and reference at the start of a run.

no adapter                          reference: a second copy of `base_model`
new adapter                         reference: the policy with the adapter off
`lora_model_dir`, train             reference: a copy of the loaded adapter
`lora_model_dir`, evaluate          reference: the policy with the adapter off
a loss without a reference          none, and only the policy is loaded
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from axolotl.utils.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedModel

from ..losses.preference import PreferenceLoss
from .forward import (
    REFERENCE_ADAPTER,
    causal_lm,
    copy_embeddings,
    copy_to_reference_adapter,
)

LOG = get_logger(__name__)

# The key of axolotl's config that `axolotl edpo-score` sets: the policy is a trained
# model and no copy of the reference.
TRAINED = "edpo_trained_model"


@dataclass(frozen=True)
class ModelSettings:
    """Where policy and reference come from.

    Attributes:
        from_recipe: Whether axolotl loads both from `base_model` of a recipe. If not,
            they are the arguments of the trainer, and may differ from the start.
        adapter_dir: Folder of an adapter that is trained further or evaluated; None: no
            such adapter.
    """

    from_recipe: bool = False
    adapter_dir: str | None = None

    @classmethod
    def from_config(cls, cfg: Any) -> "ModelSettings":
        """The settings of a recipe.

        Args:
            cfg: axolotl's config, validated.
        """
        return cls(not cfg.get(TRAINED), cfg.lora_model_dir if cfg.adapter else None)


@dataclass(frozen=True)
class StartingModels:
    """Arguments for TRL's trainer.

    Attributes:
        policy: The model that trains.
        reference: The reference, if it is a separate model; else None.
        peft_config: Config of a new adapter for TRL to add, or None.
    """

    policy: Any
    reference: PreTrainedModel | None
    peft_config: Any


def starting_models(
    policy: Any,
    reference: PreTrainedModel | None,
    peft_config: Any,
    settings: ModelSettings,
    loss: PreferenceLoss,
) -> StartingModels:
    """Loads the adapter of `lora_model_dir`, or prepares a separate reference.

    Args:
        policy: The policy that axolotl loaded, without adapter.
        reference: The reference that axolotl loaded. axolotl loads one only in
            training, and only if there is no adapter and the loss has a reference; else
            None.
        peft_config: Config of the adapter that trains. None without an adapter, and in
            evaluation.
        settings: Where policy and reference come from.
        loss: The recipe's loss, which may have no reference.

    Raises:
        ValueError: If PEFT cannot copy the adapter, for the reference.
    """
    if settings.adapter_dir:
        policy = PeftModel.from_pretrained(
            policy, settings.adapter_dir, is_trainable=True
        )
        if peft_config is not None:
            _require_copyable(policy)
        return StartingModels(policy, reference, None)
    if settings.from_recipe and peft_config is None and loss.has_reference:
        reference = _copy_of_base(policy, reference)
    return StartingModels(policy, reference, peft_config)


def _copy_of_base(
    policy: PreTrainedModel, reference: PreTrainedModel | None
) -> PreTrainedModel:
    """The reference of a recipe without an adapter: it equals the untrained policy."""
    if reference is None:
        LOG.warning(
            "`axolotl evaluate` hands over no reference: `base_model` is compared "
            "with itself, so rewards and steps are 0. `axolotl edpo-score` compares "
            "a trained model with its reference."
        )
        return copy.deepcopy(policy)
    if copy_embeddings(policy, reference):
        LOG.warning(
            "Policy and reference were loaded with different embeddings, as "
            "tokens were added to both: the reference takes the policy's."
        )
    return reference


def _require_copyable(policy: PeftModel) -> None:
    """Refuses adapters with `target_parameters`.

    TRL 1.9 does not copy them to `ref`; TRL 1.14 fails when it copies them.
    """
    if getattr(policy.peft_config["default"], "target_parameters", None):
        raise ValueError(
            "`lora_model_dir` holds an adapter with `lora_target_parameters`, of "
            "which PEFT cannot hold a second as reference: merge it with `axolotl "
            "merge-lora` and train from there"
        )


def resolve_reference_adapter(policy: PeftModel, keeps: bool) -> None:
    """Sets up the reference of a policy with an adapter from `lora_model_dir`.

    In training the reference is the adapter `ref`, a copy of the loaded adapter. It is
    not saved, because transformers cannot resume from a checkpoint with two adapters.
    In evaluation the reference is the policy with the adapter off; `ref` is removed. So
    it is where the loss has no reference.

    Args:
        policy: The policy, after TRL's trainer has added the adapter `ref`.
        keeps: Whether `ref` is the reference.
    """
    if not keeps:
        if REFERENCE_ADAPTER in policy.peft_config:
            policy.delete_adapter(REFERENCE_ADAPTER)
        return
    copy_to_reference_adapter(policy)
    save = partial(policy.save_pretrained, selected_adapters=["default"])
    policy.save_pretrained = save  # type: ignore[method-assign]


def save_adapter_only(policy: Any) -> None:
    """Prevents axolotl from saving the base model of an adapter at the end of a run.

    axolotl saves the adapter and the base model. The base model's files would have
    wrong weight names, and saving fails if weights are tied. With this change, both
    calls save the adapter.

    Args:
        policy: The policy; without an adapter nothing is changed.
    """
    if isinstance(policy, PeftModel):
        below: Any = causal_lm(policy)
        below.save_pretrained = policy.save_pretrained
