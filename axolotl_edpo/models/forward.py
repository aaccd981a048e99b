"""The forward of policy and reference, up to hidden states or logits.

The policy is a causal language model, with or without a PEFT adapter. The reference is

    a separate model                       in full fine-tuning
    the policy with its adapter off        for LoRA and QLoRA
    the policy with the adapter `ref`      if an existing adapter is trained further

`completion_hidden` runs a model without its head, which `lm_head_reader` reads. If the
head cannot be read, `completion_logits` runs the whole model.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..data.completions import Completions
from ..distributed import gathered
from ..upstream import is_repeated_blocks
from .switches import adapter_in_use

# The adapter that holds the reference; TRL gives it this name.
REFERENCE_ADAPTER = "ref"
# Logits that differ by less than this share are taken as equal. Rounding causes 0.4 %
# in bf16, and somewhat more if hidden states are rounded to 8 bits.
LOGITS_TOLERANCE = 0.03


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within it, a model computes without dropout and without gradient."""
    training = model.training
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # in eval mode, bitsandbytes repacks the weight for some CPUs, permanently
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def disable_attention_dropout(lm: PreTrainedModel) -> None:
    """Sets `attention_dropout` to 0. TRL disables only dropout that is a module."""
    for module in lm.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


@contextmanager
def reference_adapter(model: nn.Module) -> Iterator[None]:
    """Within it, a PEFT model computes the reference; other models do not change."""
    if not isinstance(model, PeftModel):
        yield
        return
    with adapter_in_use(model, next(iter(reference_adapters(model)), None)):
        yield


def reference_adapters(model: PeftModel) -> list[str]:
    """The adapters in use when a PEFT model computes the reference: `ref`, or none."""
    return [name for name in (REFERENCE_ADAPTER,) if name in model.peft_config]


def copy_to_reference_adapter(model: PeftModel, source: str = "default") -> None:
    """Copies the weights of an adapter into the adapter `ref`, with their dtype.

    Args:
        model: A model that has both adapters.
        source: The adapter to copy.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if source in parts:
            copy = [REFERENCE_ADAPTER if part == source else part for part in parts]
            parameters[".".join(copy)].data = parameter.detach().clone()


def copy_embeddings(policy: PreTrainedModel, reference: PreTrainedModel) -> bool:
    """Copies the policy's embedding and head into a reference that is a separate model.

    They can differ, because axolotl adds random rows for new tokens to each model that
    it loads.

    Args:
        policy: The loaded policy. ZeRO-3 may have sharded it. With FSDP2 the weights of
            a rank may still be on the meta device: it gets those of rank 0 later.
        reference: The loaded reference.

    Returns:
        Whether the weights differed before.
    """
    differed = False
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        source, target = (getattr(lm, getter)() for lm in (policy, reference))
        if source is None:
            continue
        weights = zip(source.parameters(), target.parameters(), strict=True)
        differed |= any([_copy_weight(*pair) for pair in weights])
    return differed


def _copy_weight(source: nn.Parameter, target: nn.Parameter) -> bool:
    """Copies a weight of the policy to the reference; returns whether it changed."""
    if source.is_meta:
        return False
    with gathered([target, source], writes=True):
        if torch.equal(target, source.to(target.device)):
            return False
        target.data.copy_(source.detach())
    return True


def completion_hidden(
    model: PreTrainedModel, inputs: Mapping[str, Any], completions: Completions
) -> torch.Tensor:
    """Last hidden states at the positions that predict a completion token.

    Args:
        model: A causal language model, inside its engine's forward.
        inputs: Arguments of the model's forward: `input_ids` of shape (rows, length),
            and others.
        completions: The completions of the same batch.

    Returns:
        Shape (tokens, hidden), in the model's dtype.
    """
    out = model.base_model(**inputs, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)[completions.positions]


def completion_logits(
    model: PreTrainedModel, inputs: Mapping[str, Any], completions: Completions
) -> torch.Tensor:
    """The model's logits at the positions that predict a completion token.

    The model can only compute logits for whole columns of the batch. It computes the
    columns in which at least one position is scored.

    Args:
        model: A causal language model, inside its engine's forward.
        inputs: Arguments of the model's forward: `input_ids` of shape (rows, length),
            and others.
        completions: The completions of the same batch.

    Returns:
        Shape (tokens, vocab), in the model's dtype.
    """
    length = inputs["input_ids"].shape[1]
    row, column = completions.positions // length, completions.positions % length
    options = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = columns = column.unique()
        column = torch.searchsorted(columns, column)
    # not `model(...)`: an engine may release the weights at the end of that call
    out = model.forward(**inputs, use_cache=False, **options)
    return out.logits[row, column]


def compile_layers(module: nn.Module, keywords: Mapping[str, Any]) -> None:
    """Compiles a model layer by layer, in place.

    The loss is computed inside the model's forward. Compiling the whole model would
    compile the loss too, again for every batch.

    Args:
        module: A causal language model without its head, or a part of it.
        keywords: Arguments of `torch.compile`.
    """
    for child in module.children():
        if not is_repeated_blocks(child):
            compile_layers(child, keywords)
            continue
        for layer in child.children():
            layer.compile(**keywords)


def check_causal(model: PreTrainedModel) -> None:
    """Checks that the logits at a position do not depend on later tokens.

    It runs two sequences with a shared prefix, and compares their logits at the end of
    the prefix.

    Args:
        model: A causal language model, inside its engine's forward.

    Raises:
        ValueError: If the logits differ.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(16, device=model.device).view(2, 8) % vocab
    ids[1, :4] = ids[0, :4]
    positions = torch.tensor([3, 11], device=model.device)
    completions = Completions(positions, ids.flatten()[positions], positions)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        first, second = completion_logits(model, inputs, completions).float()
    if (first - second).abs().max() > LOGITS_TOLERANCE * first.abs().max():
        raise ValueError(
            f"`base_model` of type {model.config.model_type} is not causal: its logits "
            "depend on the tokens that follow; use a causal language model"
        )
