"""Counts the weights of each part of a model, without loading any."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ..upstream import is_repeated_blocks


class Sizes(NamedTuple):
    """Numbers of values of the parts of a model.

    Attributes:
        all: Of all weights, without adapters.
        linear: Of the weights in linear layers of the decoder, which `qlora` quantizes
            to 4 bits.
        lora: Of a LoRA adapter with rank 1 on those layers.
        layer: Of the largest decoder layer.
        root: Of the weights outside of decoder layers: embedding, head, last norm.
        head: Of the head, shape (vocab, hidden).
        layers: Number of decoder layers.
        hidden: Width of the hidden states.
        per_token: Of a layer's activations per token in backward: those in the dtype of
            the weights, and those in float32; see `sizes_of`.
    """

    all: int
    linear: int
    lora: int
    layer: int
    root: int
    head: int
    layers: int
    hidden: int
    per_token: tuple[int, int]


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Counts the weights and activations of a model.

    The activations of a layer that backward needs, per token:

        two norms, each         the input in float32, the normalized input, the output
        attention               q, k, v, and the output twice: before and after it is
                                made contiguous
        MLP                     gate, up, activated gate, and their product

    During the backward of the MLP there are also the gradients of three of the MLP's
    activations, and of the layer's input and output.

    Args:
        config: Config of a causal language model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = next(m for m in model.base_model.modules() if is_repeated_blocks(m))
    linear = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    total, text = _numel(model), config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    dim = getattr(text, "head_dim", None) or hidden // heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    within = 4 * hidden + (3 * heads + 2 * kv) * dim + 4 * text.intermediate_size
    backward = 2 * hidden + 3 * text.intermediate_size
    return Sizes(
        all=total,
        linear=sum(m.weight.numel() for m in linear),
        lora=sum(m.in_features + m.out_features for m in linear),
        layer=max(_numel(layer) for layer in layers),
        root=total - _numel(layers),
        head=text.vocab_size * hidden,
        layers=len(layers),
        hidden=hidden,
        per_token=(within + backward, 2 * hidden),
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
