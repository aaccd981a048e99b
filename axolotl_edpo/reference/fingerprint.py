"""Which reference it is whose hidden states a store keeps.

    weights      every tensor of it, quantized ones with their scales
    adapter      how much an adapter that is part of it counts
    config       what the model computes from them; its code, if it brings that along
    precision    dtype of the hidden states, attention, recipe keys

What they depend on beside that are the tokens of the pair. Not in it is what changes
rounding only: rows, engine, kernels, device.
"""

import inspect
import json
from typing import Any

import torch
import transformers
import xxhash
from accelerate import PartialState
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..config.args import PRECOMPUTE
from ..distributed import gathered, of_first
from ..models.forward import REFERENCE_ADAPTER
from ..models.packed_attention import EAGER
from .hidden_cache import raw

# Recipe keys that change what a model computes from the same weights.
COMPUTE_KEYS = ("qat", "fp8", "tf32")
# Config keys that say nothing of what a model computes.
_NOT_COMPUTED = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_REMOTE = "transformers_modules"


def identity_of(
    reference: nn.Module, lm: PreTrainedModel, hidden: torch.Tensor, **more: Any
) -> str:
    """Names a reference by all that its hidden states depend on, but the pair.

    Args:
        reference: Without its engine; an adapter that trains is left out.
        lm: The causal language model whose config and code it has.
        hidden: Some of its hidden states.
        **more: What else they depend on.

    Returns:
        The same on every rank.

    Raises:
        ValueError: On every rank, if there are weights that have no bytes.
    """
    config = lm.config.to_dict()
    for key in _NOT_COMPUTED:
        config.pop(key, None)
    attention = lm.config._attn_implementation
    told = {
        "weights": _weights(reference),
        "adapter": _scales(reference),
        "config": config,
        "code": _remote_code(lm),
        "attention": "eager" if attention == EAGER else attention,
        "hidden": [hidden.shape[1], str(hidden.dtype)],
        "transformers": transformers.__version__,
        **more,
    }
    text = json.dumps(told, sort_keys=True, default=str)
    return of_first(xxhash.xxh3_128_hexdigest(text.encode()))


def _weights(reference: nn.Module, leave_out: str = "default") -> str:
    """Weights, buffers and scales in their order; gathered one after the other.

    Args:
        reference: Without its engine, sharded or not.
        leave_out: The adapter that trains.

    Returns:
        A digest, on the first rank.

    Raises:
        ValueError: On every rank, if there are weights that have no bytes.
    """
    digest, first, strange = xxhash.xxh3_128(), PartialState().is_main_process, ""
    for name, tensor in reference.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or leave_out in name.split("."):
            continue
        with gathered([tensor]) as (whole,):  # by all ranks, whatever the first finds
            if not first:
                continue
            digest.update(repr((tuple(whole.shape), whole.dtype)).encode())
            try:
                digest.update(raw(whole))
            except (RuntimeError, TypeError) as error:
                strange = f"{name} ({error})"
    if strange := of_first(strange):
        raise ValueError(
            f"`{PRECOMPUTE}: true`: {strange} cannot be told from other "
            "weights: remove it"
        )
    return digest.hexdigest()


def _scales(reference: nn.Module) -> list[Any]:
    """What the reference's own adapter is multiplied with, layer by layer."""
    layers = (m for m in reference.modules() if isinstance(m, LoraLayer))
    own, name = (layer.scaling for layer in layers), REFERENCE_ADAPTER
    return [scaling[name] for scaling in own if name in scaling]


def _remote_code(lm: PreTrainedModel) -> list[str]:
    """Of a model that is no part of transformers."""
    own = [cls for cls in type(lm).__mro__ if cls.__module__.startswith(_REMOTE)]
    modules = dict.fromkeys(inspect.getmodule(cls) for cls in own)
    return [inspect.getsource(module) for module in modules if module]
