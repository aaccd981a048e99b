"""The fingerprint of a reference: it names its cache.

    weights      all tensors of the model, with the scales of quantized ones
    adapter      scaling factors of the reference's adapter
    config       the model's config, and its code if that is shipped with the weights
    precision    dtype of the hidden states, attention, some recipe keys

Hidden states depend on these and on the tokens of the pair. The layout of pairs in
rows, the engine, kernels and the device are left out: they change rounding only.
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
from ..distributed import broadcast_from_rank0, gathered
from ..models.forward import REFERENCE_ADAPTER
from ..models.packed_attention import EAGER
from ..upstream import attention_name, is_remote_code
from .cache import tensor_bytes

# Recipe keys that change what a model computes from the same weights.
COMPUTE_KEYS = ("qat", "fp8", "tf32")
# Config keys that do not change what a model computes.
_IRRELEVANT_KEYS = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# PEFT's name of the adapter that trains.
_TRAINED_ADAPTER = "default"


def fingerprint_of(
    reference: nn.Module, lm: PreTrainedModel, hidden: torch.Tensor, **parts: Any
) -> str:
    """The fingerprint of a reference: a digest of everything but the pairs.

    Args:
        reference: The model without its engine. An adapter that trains is left out.
        lm: The causal language model that has the reference's config and code.
        hidden: Some hidden states of the reference, shape (tokens, hidden), for their
            width and dtype.
        **parts: Further values that hidden states depend on.

    Returns:
        32 hexadecimal digits, the same on every rank.

    Raises:
        ValueError: On every rank, if the bytes of a weight cannot be read.
    """
    attention = attention_name(lm.config)
    parts |= {
        "weights": _weights_digest(reference),
        "adapter": _adapter_scales(reference),
        "config": _relevant_config(lm),
        "code": remote_code(lm),
        "attention": "eager" if attention == EAGER else attention,
        "hidden": [hidden.shape[1], str(hidden.dtype)],
        "transformers": transformers.__version__,
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return broadcast_from_rank0(xxhash.xxh3_128_hexdigest(text.encode()))


def _relevant_config(lm: PreTrainedModel) -> dict[str, Any]:
    config = lm.config.to_dict()
    return {key: value for key, value in config.items() if key not in _IRRELEVANT_KEYS}


def _weights_digest(reference: nn.Module) -> str:
    """A digest of weights, buffers and scales, which are gathered one by one.

    Args:
        reference: The model without its engine, sharded or not.

    Returns:
        The digest on rank 0; meaningless on other ranks.

    Raises:
        ValueError: On every rank, if the bytes of a weight cannot be read.
    """
    digest, without_bytes = xxhash.xxh3_128(), ""
    is_rank0 = PartialState().is_main_process
    for name, tensor in reference.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or _TRAINED_ADAPTER in name.split("."):
            continue
        with gathered([tensor]) as (whole,):  # every rank has to take part
            if not is_rank0:
                continue
            digest.update(repr((tuple(whole.shape), whole.dtype)).encode())
            try:
                digest.update(tensor_bytes(whole))
            except (RuntimeError, TypeError) as error:
                without_bytes = f"{name} ({error})"
    if without_bytes := broadcast_from_rank0(without_bytes):
        raise ValueError(
            f"`{PRECOMPUTE}: true`: {without_bytes} cannot be told from other "
            "weights: remove it"
        )
    return digest.hexdigest()


def _adapter_scales(reference: nn.Module) -> list[Any]:
    """Scaling factors of the reference's adapter, one per layer that has it."""
    layers = (m for m in reference.modules() if isinstance(m, LoraLayer))
    scales = (layer.scaling.get(REFERENCE_ADAPTER) for layer in layers)
    return [scale for scale in scales if scale is not None]


def remote_code(lm: PreTrainedModel) -> list[str]:
    """Source code that is shipped with the weights, one text per Python module.

    Empty for a model whose code is in transformers.
    """
    classes = [cls for cls in type(lm).__mro__ if is_remote_code(cls)]
    modules = dict.fromkeys(inspect.getmodule(cls) for cls in classes)
    return [inspect.getsource(module) for module in modules if module]
