"""Hidden states and heads of policy and reference.

The policy is a causal language model, plain or under a PEFT adapter. The reference is
one of three:
    a separate model                    full fine-tuning
    the same weights, adapter off       LoRA and QLoRA
    the same weights, adapter `ref`     an adapter that is trained further

`completion_hidden` runs the body only; `head_of` reads the head and what the model does
to its logits afterwards. It raises `HeadError` on a head it does not know instead of
guessing, and `check_head` compares what it read with the model's own logits. A model
whose head cannot be read makes its logits itself: `completion_logits`.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.other import is_repeated_blocks
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..data.packing import Completions
from ..distributed import gathered, inside
from ..ops.lm_head import (
    Head,
    LowRank,
    Quantized4bit,
    Quantized8bit,
    Rows,
    full_precision,
)
from .packed_attention import evaluating
from .switches import adapter_in_use

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
# Largest relative difference of the model's own logits that is rounding: in bf16 it is
# 0.4 %, with the hidden states rounded to 8 bits some more.
_TOLERANCE = 0.03


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def disable_attention_dropout(lm: PreTrainedModel) -> None:
    """What TRL's `disable_dropout` leaves: attention's is a number, not a module."""
    for module in lm.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


@contextmanager
def reference_adapter(model: nn.Module) -> Iterator[None]:
    """Within it, a PEFT model computes its reference; others are left alone."""
    if not isinstance(model, PeftModel):
        yield
        return
    with adapter_in_use(model, next(iter(_reference_adapters(model)), None)):
        yield


def _reference_adapters(model: PeftModel) -> list[str]:
    """Adapters of the reference that is a PEFT model's own: one, or none."""
    return [name for name in (REFERENCE_ADAPTER,) if name in model.peft_config]


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


def copy_embeddings(policy: PreTrainedModel, reference: PreTrainedModel) -> bool:
    """Gives a reference of its own the policy's embedding and head.

    axolotl adds rows for new tokens to each model it loads, at random.

    Args:
        policy: As it was loaded; ZeRO-3 may have sharded it, and with FSDP2 a rank may
            hold no weights yet, and get those of the first.
        reference: The same.

    Returns:
        Whether they differed.
    """
    differed = False
    for part in ("get_input_embeddings", "get_output_embeddings"):
        own, other = (getattr(lm, part)() for lm in (policy, reference))
        if own is None:
            continue
        for theirs, ours in zip(other.parameters(), own.parameters(), strict=True):
            if ours.is_meta:
                continue
            with gathered([theirs, ours], writes=True):
                if not torch.equal(theirs, ours.to(theirs.device)):
                    theirs.data.copy_(ours.detach())
                    differed = True
    return differed


def completion_hidden(
    model: PreTrainedModel, inputs: Mapping[str, Any], completions: Completions
) -> torch.Tensor:
    """Last hidden states at the positions that predict a completion token.

    Args:
        model: A causal language model.
        inputs: `input_ids` of shape (rows, length), and what else its forward takes.
        completions: The positions, over the flattened batch.

    Returns:
        Shape (tokens, hidden).
    """
    out = model.base_model(**inputs, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)[completions.positions]


def completion_logits(
    model: PreTrainedModel, inputs: Mapping[str, Any], completions: Completions
) -> torch.Tensor:
    """Logits as the model makes them, where its head cannot be read.

    Args:
        model: A causal language model, inside its engine's forward.
        inputs: `input_ids` of shape (rows, length), and what else its forward takes.
        completions: The positions, over the flattened batch.

    Returns:
        Shape (tokens, vocab). The model makes them for every column in which any
        row has a position that is scored.
    """
    length = inputs["input_ids"].shape[1]
    row, column = completions.positions // length, completions.positions % length
    only = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        only["logits_to_keep"] = columns = column.unique()
        column = torch.searchsorted(columns, column)
    # not `model(...)`: an engine may let go of the weights at the end of that call
    out = model.forward(**inputs, use_cache=False, **only)
    return out.logits[row, column]


def compile_layers(module: nn.Module, keywords: Mapping[str, Any]) -> None:
    """Compiles a model layer by layer, in place.

    The walk from batch to loss runs inside the model's forward; compiled as a whole, it
    would be compiled too, anew for every batch.

    Args:
        module: A causal language model without its head, or a part of it.
        keywords: Of `torch.compile`.
    """
    for child in module.children():
        if not is_repeated_blocks(child):
            compile_layers(child, keywords)
            continue
        for layer in child.children():
            layer.compile(**keywords)


class HeadError(ValueError):
    """The head is not one that `head_of` can read; the message says why."""


def head_modules(
    model: PreTrainedModel, adapters: Sequence[str] | None = None
) -> list[nn.Module]:
    """The modules whose weights `head_of` reads: the linear layer, then LoRA's.

    Args:
        model: A causal language model.
        adapters: The adapters in use; by default those that are in use now.

    Raises:
        HeadError: If the head is not known.
    """
    module, names = _head_in_use(model, adapters)
    if not isinstance(module, LoraLayer):
        return [module]
    return [module.base_layer, *(module.lora_B[name] for name in names)]


def head_of(model: PreTrainedModel, adapters: Sequence[str] | None = None) -> Head:
    """The head with the transform that the model applies.

    Args:
        model: A causal language model.
        adapters: The adapters in use; by default those that are in use now.

    Raises:
        HeadError: If the head is not known, or the config names a transform of the
            logits that is not known.
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
    """The head of a reference that is the policy's model, and `head_modules` of it."""
    lm = causal_lm(model)
    adapters = _reference_adapters(model) if isinstance(model, PeftModel) else None
    return head_modules(lm, adapters), head_of(lm, adapters)


@contextmanager
def whole_head(head: Head) -> Iterator[Head]:
    """The head of a frozen model, outside its forward, gathered from all ranks.

    ZeRO-3 keeps an empty weight there, FSDP2 a shard; the whole one is let go on exit.
    """
    if not isinstance(head.weight, torch.Tensor):
        yield head
        return
    bias = [] if head.bias is None else [head.bias]
    with gathered([head.weight, *bias]) as whole:
        yield replace(head, weight=whole[0], bias=whole[1] if bias else None)


def check_causal(model: PreTrainedModel) -> None:
    """Two sequences that begin alike must have the same logits as long as they do.

    Args:
        model: A causal language model, inside its engine's forward.

    Raises:
        ValueError: If the model looks ahead.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(16, device=model.device).view(2, 8) % vocab
    ids[1, :4] = ids[0, :4]
    third = torch.tensor([3, 11], device=model.device)
    completions = Completions(third, ids.flatten()[third], third)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        one, other = completion_logits(model, inputs, completions).float()
    if (one - other).abs().max() > _TOLERANCE * one.abs().max():
        raise ValueError(
            f"`base_model` of type {model.config.model_type} is not causal: its logits "
            "depend on the tokens that follow; use a causal language model"
        )


def check_head(model: PreTrainedModel) -> None:
    """Compares the head that was read with the logits of the model itself.

    Args:
        model: A causal language model, inside its engine's forward.

    Raises:
        HeadError: If the head is not known, or if they differ by more than rounding.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(16, device=model.device).view(2, 8) % vocab
    some = torch.tensor([3, 4, 6, 13, 14], device=model.device)
    completions = Completions(some, ids.flatten()[some], some[:2])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        own = completion_logits(model, inputs, completions).float()
        hidden = completion_hidden(model, inputs, completions)
        ours = inside(head_modules(model), lambda own: _logits(model, own), hidden)
    difference = ((ours - own).abs().max() / own.abs().max()).item()
    if not difference < _TOLERANCE:
        raise HeadError(
            f"its logits differ from head × hidden states by {difference:.0%}: the "
            "model does something to them that its config does not name"
        )


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    head = head_of(model)
    if any(tensor.device != hidden.device for tensor in head.tensors):
        raise HeadError("its weight is not on the model's device")
    return head.logits(hidden)


def _head_in_use(
    model: PreTrainedModel, adapters: Sequence[str] | None
) -> tuple[Any, list[str]]:
    """The head's module without PEFT's wrappers that are not in use.

    Returns:
        The module, and the LoRA adapters that add to its output: none, unless it is a
        `LoraLayer`.
    """
    module = model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        name = next(iter(_in_use(module, adapters)), None)
        use_copy = name in module.modules_to_save
        module = module.modules_to_save[name] if use_copy else module.original_module
    if not isinstance(module, LoraLayer):
        return module, []
    names = [] if module.merged else _in_use(module, adapters)
    names = [name for name in names if name in module.lora_A]
    return (module, names) if names else (module.base_layer, [])


def _in_use(module: Any, adapters: Sequence[str] | None) -> Sequence[str]:
    """The adapters in use in a layer of PEFT's, given those of the model."""
    if adapters is not None:
        return adapters
    return [] if module.disable_adapters else module.active_adapters


def _low_rank(module: LoraLayer, name: str) -> LowRank:
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
        dtype: What an 8-bit weight is multiplied in.

    Raises:
        HeadError: If the layer is of another type.
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
    named = _TRANSFORM.search(key) and not _NO_TRANSFORM.search(key)
    return bool(named) and value not in (None, False, True, 0, 1)


def _scale_factor(model_type: str, key: str) -> Callable[[float], float]:
    for (start, name), factor in _SCALES.items():
        if model_type.startswith(start) and name == key:
            return factor
    raise HeadError(
        f"its config has `{key}`, and what {model_type} does with it is not known"
    )
