"""Hidden states and heads of policy and reference.

The policy is a causal language model, plain or under a PEFT adapter. The reference is
one of three:
    a separate model                    full fine-tuning
    the same weights, adapter off       LoRA and QLoRA
    the same weights, adapter `ref`     an adapter that is trained further

`completion_hidden` runs the body only; `head_of` reads the head and what the model does
to its logits afterwards, and refuses a head it does not know instead of guessing.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from .batch import Completions
from .logprobs import Head

REFERENCE_ADAPTER = "ref"

# What a model does to its logits after the head: (start of model_type, config key) ->
# factor on the logits. A soft cap is the same everywhere.
_SCALES: dict[tuple[str, str], Callable[[float], float]] = {
    ("cohere", "logit_scale"): lambda value: value,
    ("granite", "logits_scaling"): lambda value: 1 / value,
    ("falcon_h1", "lm_head_multiplier"): lambda value: value,
}
_CAP = "final_logit_softcapping"
# Config keys that sound like such a transform, and those of them that are none.
_TRANSFORM = re.compile(r"logit|lm_head_|output_multiplier")
_NO_TRANSFORM = re.compile(r"^att|router|logits_to_keep")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@contextmanager
def reference_adapter(model: nn.Module) -> Iterator[None]:
    """Within it, a PEFT model computes its reference; others are left alone."""
    if not isinstance(model, PeftModel):
        yield
        return
    name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None
    with use_adapter(model, adapter_name=name):
        yield


def copy_to_reference_adapter(model: PeftModel, source: str = "default") -> None:
    """Makes the adapter `ref` a bitwise copy of another, dtype included.

    Args:
        model: Has both adapters.
        source: The adapter that is trained.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if source in parts:
            copy = [REFERENCE_ADAPTER if part == source else part for part in parts]
            parameters[".".join(copy)].data = parameter.detach().clone()


def completion_hidden(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completions: Completions,
) -> torch.Tensor:
    """Last hidden states at the positions that predict a completion token.

    Args:
        model: A causal language model.
        input_ids: Shape (sequences, length).
        attention_mask: Shape (sequences, length).
        completions: The positions, over the flattened batch.

    Returns:
        Shape (tokens, hidden).
    """
    out = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    )
    return out.last_hidden_state.flatten(0, 1)[completions.positions]


def head_module(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes the logits, as it is active now.

    Raises:
        ValueError: If the head is not a plain linear layer.
    """
    module = model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        name = module.active_adapters[0] if module.active_adapters else None
        use_copy = name in module.modules_to_save and not module.disable_adapters
        module = module.modules_to_save[name] if use_copy else module.original_module
    if type(module) is not nn.Linear:
        raise ValueError(
            f"`rl: edpo` cannot read a head of type {type(module).__name__} in "
            f"{type(model).__name__}: keep `lm_head` out of `lora_target_modules` "
            "(train it through `lora_modules_to_save`) and out of quantization"
        )
    return module


def head_of(model: PreTrainedModel) -> Head:
    """The head with the transform that the model applies to its logits.

    Raises:
        ValueError: If the head is not a plain linear layer, or the config names a
            transform of the logits that is not known.
    """
    module, config = head_module(model), model.config.get_text_config()
    scale = 1.0
    for key, value in vars(config).items():
        if key != _CAP and _is_transform(key, value):
            scale *= _scale_factor(config.model_type, key)(value)
    return Head(module.weight, module.bias, scale, getattr(config, _CAP, None))


def _is_transform(key: str, value: object) -> bool:
    named = _TRANSFORM.search(key) and not _NO_TRANSFORM.search(key)
    return bool(named) and value not in (None, False, True, 0, 1)


def _scale_factor(model_type: str, key: str) -> Callable[[float], float]:
    for (start, name), factor in _SCALES.items():
        if model_type.startswith(start) and name == key:
            return factor
    raise ValueError(
        f"`base_model` of type {model_type} has `{key}` in its config, which "
        "`rl: edpo` does not know how to apply to the logits: use `rl: dpo`"
    )
