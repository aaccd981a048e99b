"""Reads the head of a model: its weights, and how the model transforms its logits.

`head_of` raises `HeadError` for a head that it does not know. `check_head` compares
logits that are computed from the head with the logits of the model.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..data.completions import Completions
from ..distributed import gathered, is_sharded, within_modules_forward
from ..ops.lm_head import (
    Head,
    LowRank,
    Quantized4bit,
    Quantized8bit,
    Rows,
    full_precision,
)
from .forward import (
    LOGITS_TOLERANCE,
    causal_lm,
    completion_hidden,
    completion_logits,
    evaluating,
    reference_adapters,
)

# (start of model_type, config key) -> function from the key's value to the factor on
# the logits.
_SCALES: dict[tuple[str, str], Callable[[float], float]] = {
    ("cohere", "logit_scale"): lambda value: value,
    ("granite", "logits_scaling"): lambda value: 1 / value,
    ("falcon_h1", "lm_head_multiplier"): lambda value: value,
}
# The config key of the soft cap, in all models.
_CAP = "final_logit_softcapping"
# Config keys that may be transforms of the logits, and those of them that are not.
_TRANSFORM = re.compile(r"logit|lm_head_|output_multiplier")
_NO_TRANSFORM = re.compile(r"^att|router|logits_to_keep")


class HeadError(ValueError):
    """`head_of` cannot read the head; the message says why."""


def head_modules(
    model: PreTrainedModel, adapters: Sequence[str] | None = None
) -> list[nn.Module]:
    """The modules whose weights `head_of` reads: the linear layer, then each `lora_B`.

    Args:
        model: A causal language model.
        adapters: Names of the adapters to use; None: the active ones.
    """
    module, names = _head_in_use(model, adapters)
    if not isinstance(module, LoraLayer):
        return [module]
    return [module.base_layer, *(module.lora_B[name] for name in names)]


def head_of(model: PreTrainedModel, adapters: Sequence[str] | None = None) -> Head:
    """The head, with the transform that the model applies to its logits.

    Args:
        model: A causal language model.
        adapters: Names of the adapters to use; None: the active ones.

    Raises:
        HeadError: If the type of the head is unknown, or if the config has an unknown
            transform of the logits.
    """
    module, names = _head_in_use(model, adapters)
    config = model.config.get_text_config()
    lora = tuple(_low_rank(module, name) for name in names)
    if isinstance(module, LoraLayer):
        module = module.base_layer
    scale = 1.0
    for key, value in vars(config).items():
        if key != _CAP and _is_transform(key, value):
            scale *= _scale_factor(config.model_type, key)(value)
    cap = getattr(config, _CAP, None)
    weight = _weight(module, model.dtype)
    return Head(weight, module.bias, scale, cap, lora)


def shared_reference_head(model: nn.Module) -> tuple[list[nn.Module], Head]:
    """The head of a reference that shares the policy's weights.

    Args:
        model: The policy, not wrapped by an engine.

    Returns:
        The modules whose weights the head reads, and the head.
    """
    lm = causal_lm(model)
    adapters = reference_adapters(model) if isinstance(model, PeftModel) else None
    return head_modules(lm, adapters), head_of(lm, adapters)


@contextmanager
def whole_head(head: Head) -> Iterator[Head]:
    """Gathers the weights of a frozen model's head, outside the model's forward.

    There ZeRO-3 holds an empty weight, and FSDP2 a shard.

    Args:
        head: The head, with the weights as the engine holds them.

    Yields:
        The head with its whole weights.
    """
    if not isinstance(head.weight, torch.Tensor):
        yield head
        return
    bias = [] if head.bias is None else [head.bias]
    with gathered([head.weight, *bias]) as whole:
        yield replace(head, weight=whole[0], bias=whole[1] if bias else None)


def copy_from_file(head: Head) -> Head:
    """Copies a head on the CPU, whose weights may be mapped from the model's file.

    The copy lets the file be unmapped. Sharded heads are returned as they are.
    """

    def copy(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or is_sharded(tensor):
            return tensor
        return tensor.detach().clone() if tensor.device.type == "cpu" else tensor

    return replace(head, weight=copy(head.weight), bias=copy(head.bias))


def check_head(model: PreTrainedModel) -> None:
    """Checks that the head gives the logits of the model.

    Args:
        model: A causal language model, inside its engine's forward.

    Raises:
        HeadError: If `head_of` cannot read the head, or if the logits differ by more
            than rounding.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(16, device=model.device).view(2, 8) % vocab
    positions = torch.tensor([3, 4, 6, 13, 14], device=model.device)
    completions = Completions(positions, ids.flatten()[positions], positions[:2])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        expected = completion_logits(model, inputs, completions).float()
        hidden = completion_hidden(model, inputs, completions)
        logits = within_modules_forward(
            head_modules(model), partial(_logits, model), hidden
        )
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference < LOGITS_TOLERANCE:
        raise HeadError(
            f"its logits differ from head × hidden states by {difference:.0%}: the "
            "model does something to them that its config does not name"
        )


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states of shape (tokens, hidden), computed from `head_of`."""
    head = head_of(model)
    if any(tensor.device != hidden.device for tensor in head.tensors):
        raise HeadError("its weight is not on the model's device")
    return head.logits(hidden)


def _head_in_use(
    model: PreTrainedModel, adapters: Sequence[str] | None
) -> tuple[Any, list[str]]:
    """The module of the head, without PEFT wrappers that have no effect.

    Returns:
        The module, and the names of the LoRA adapters that add to its output: at least
        one if the module is a `LoraLayer`, else none.
    """
    module = model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        name = next(iter(_in_use(module, adapters)), None)
        copies = module.modules_to_save
        module = copies[name] if name in copies else module.original_module
    if not isinstance(module, LoraLayer):
        return module, []
    names = [] if module.merged else _in_use(module, adapters)
    names = [name for name in names if name in module.lora_A]
    return (module, names) if names else (module.base_layer, [])


def _in_use(module: Any, adapters: Sequence[str] | None) -> Sequence[str]:
    """The names in `adapters`; if it is None, the active adapters of a PEFT layer."""
    if adapters is not None:
        return adapters
    return [] if module.disable_adapters else module.active_adapters


def _low_rank(module: LoraLayer, name: str) -> LowRank:
    """What a LoRA adapter adds to the head.

    Raises:
        HeadError: If the adapter has more than two matrices.
    """
    first, second = module.lora_A[name], module.lora_B[name]
    if name in module.lora_variant or second.bias is not None:
        raise HeadError("its adapter is more than LoRA (DoRA, or a bias)")

    def down(hidden: torch.Tensor) -> torch.Tensor:
        with full_precision(hidden, first.weight):
            dropped = module.lora_dropout[name](hidden.to(first.weight.dtype))
            return first(dropped) * module.scaling[name]

    return LowRank(down, second.weight)


def _weight(module: Any, dtype: torch.dtype) -> torch.Tensor | Rows:
    """The weight of a linear layer, plain or quantized by bitsandbytes.

    Args:
        module: The layer.
        dtype: The dtype to which an 8-bit weight is dequantized.

    Raises:
        HeadError: If the type of the layer is unknown.
    """
    kind: str = type(module).__name__
    weight: Any = getattr(module, "weight", None)
    if type(module) is nn.Linear:
        return module.weight
    if kind == "Linear4bit":
        return _weight_of_4bit(weight)
    if kind == "Linear8bitLt" and weight.dtype == torch.int8:
        scales = weight.SCB if module.state.SCB is None else module.state.SCB
        return Quantized8bit(weight.data, scales, dtype)
    raise HeadError(f"its type is {kind}")


def _weight_of_4bit(weight: Any) -> Quantized4bit:
    state = getattr(weight, "quant_state", None)
    if state is None or state.shape[1] % state.blocksize:
        raise HeadError("it is in 4 bits, and its rows are not whole blocks")
    if getattr(state, "packing_format_for_cpu", False):
        raise HeadError("it is in 4 bits, and packed anew for this processor")
    return Quantized4bit(weight.data, state)


def _is_transform(key: str, value: object) -> bool:
    """Whether a config key, with this value, is a transform of the logits."""
    named = _TRANSFORM.search(key) and not _NO_TRANSFORM.search(key)
    return bool(named) and value not in (None, False, True, 0, 1)


def _scale_factor(model_type: str, key: str) -> Callable[[float], float]:
    for (start, name), factor in _SCALES.items():
        if model_type.startswith(start) and name == key:
            return factor
    raise HeadError(
        f"its config has `{key}`, and what {model_type} does with it is not known"
    )
