"""Attention over a packed row, on top of whatever attention the model uses.

A model of transformers looks its attention up by name (`AttentionInterface`) and hands
it every keyword its forward was given. So a function registered under that name that
finds `segments` among them does the packed row; without them it is the one it replaced,
to the bit:

    flash_attention_2, _3   one varlen call: boundaries of queries and of keys
    flex_attention          one call with a block mask
    sdpa                    where `_takes_varlen`, on a GPU in 16 bits: one call of
                            torch's `varlen_attn` with the same boundaries
    sdpa elsewhere, eager   one call per segment: a dense mask over the row would cost
                            the square of its length. On a GPU without cuDNN; on a CPU
                            one call per `BAND` queries of it

In all of them a segment's keys may outnumber its queries, which then are the last
ones: keys and values of a prompt are used by both answers. The window of a layer is the
keyword `sliding_window`, as FlashAttention gets it; positions within a segment run on,
so it counts what it would count in a sequence of its own.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    eager_mask,
    flex_attention_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..background import on_device
from ..data.packing import Segments, model_inputs, pack, select_completions
from ..upstream import varlen_shares_heads

# What a layer may be where a row holds several sequences: the others carry a state over
# their boundaries, or see what no keyword of the attention names.
LAYERS = {"full_attention", "sliding_attention"}
# Largest relative difference of a hidden state that is rounding, in 16 bits.
TOLERANCE = 0.1
# Where the cache of a row keeps which windows its layers named.
WINDOWS = "windows"
# `eager` is no registered name: each model brings its own function.
EAGER = "edpo_eager"
# torch's function; attention in FP8 puts another in its place during a forward.
SDPA = functional.scaled_dot_product_attention
# Keywords that models give their attention, and `varlen_attn` has no argument for.
BEYOND_VARLEN = ("softcap", "s_aux", "position_bias")
# So many queries of a segment, or some more, are taken at once on a CPU: the first of a
# long segment need not be multiplied with its last keys.
BAND = 128

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class PackingError(ValueError):
    """A model's rows cannot hold several sequences; the message says why."""


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within it, a model computes without dropout and without gradient."""
    training = model.training
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # else bitsandbytes packs its weight for some CPUs, and for good
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check_layers(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Refuses what is known to mix the sequences of a row, before a model is loaded.

    Args:
        kind: Class of the model.
        config: Its config.

    Raises:
        PackingError: Names the reason.
    """
    config = config.get_text_config()
    others = set(getattr(config, "layer_types", None) or LAYERS) - LAYERS
    if others or kind._is_stateful:
        kinds = ", ".join(sorted(others)) or config.model_type
        raise PackingError(f"it has layers that carry a state or a mask ({kinds})")
    if getattr(config, "attention_chunk_size", None) or not kind._supports_flash_attn:
        raise PackingError("its attention takes no boundaries between sequences")


def check_packing(model: PreTrainedModel, share: bool) -> None:
    """Compares two pairs in one row with the same pairs padded.

    Args:
        model: `enable_packing` was called on it; all its weights are at hand.
        share: Whether each pair's common start is in the row once.

    Raises:
        PackingError: If the hidden states differ by more than rounding.
    """
    lengths = torch.tensor([[7], [9], [11], [5]])
    mask = (torch.arange(11) < lengths).long()
    ids = torch.arange(44).view(4, 11) % model.config.get_text_config().vocab_size
    ids[2:, :4] = ids[:2, :4]
    padded = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}
    apart, together = select_completions(ids, mask), pack(padded, share)
    with evaluating(model):
        expected = _hidden(model, model_inputs(padded), apart.positions)
        found = _hidden(model, model_inputs(together), together["positions"])
    norms = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not (difference := norms.max().item()) < TOLERANCE:
        raise PackingError(
            f"sequences in one row change each other: hidden states differ by up to "
            f"{difference:.0%} from those of a padded batch"
        )
    seen = together["segments"].cache.made.get(WINDOWS, {None})
    if _has_windows(model.config.get_text_config()) and seen == {None}:
        raise PackingError("its attention is not told of its window")


def _hidden(model: PreTrainedModel, inputs: dict, positions: torch.Tensor) -> Any:
    here = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    try:
        out = model.base_model(**here, use_cache=False)
    except Exception as error:  # of whatever kind a model's own code raises
        kind = type(error).__name__
        raise PackingError(f"its forward does not take them: {kind}: {error}") from None
    return out.last_hidden_state.flatten(0, 1)[positions].float()


def _has_windows(config: PreTrainedConfig) -> bool:
    """Whether the config says that a layer sees a window only."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return "sliding_attention" in layers
    used = getattr(config, "use_sliding_window", True)
    return bool(used and getattr(config, "sliding_window", None))


def enable_packing(model: PreTrainedModel) -> None:
    """Lets the attention of a model take `segments`; twice is as good as once.

    Args:
        model: Its attention's name is wrapped for the whole process, but for calls
            with `segments` nothing changes.

    Raises:
        PackingError: If the attention has no boundaries between sequences.
    """
    name = model.config._attn_implementation
    if name == "eager":
        each = _wrap(_eager, _per_segment(_eager, eager_mask))
        AttentionInterface.register(EAGER, each)
        AttentionMaskInterface.register(EAGER, eager_mask)
        model.set_attn_implementation(EAGER)
        name = model.config._attn_implementation
    base: Any = ALL_ATTENTION_FUNCTIONS.get(name)
    if not hasattr(base, "packs"):
        AttentionInterface.register(name, _wrap(base, _packing(name)(base)))
    if not hasattr(ALL_ATTENTION_FUNCTIONS.get(name), "packs"):
        raise PackingError(f"`attn_implementation: {name}` is already replaced")


def _packing(name: str) -> Callable[[Attention], Attention]:
    """What makes of an attention of this name one that takes segments."""
    if "flash" in name:
        return _flash
    if name == "flex_attention":
        return _block_masked
    if name == "sdpa":
        return _sdpa
    raise PackingError(f"`attn_implementation: {name}` has no boundaries in a row")


def _wrap(base: Attention, attend: Attention) -> Attention:
    """`attend` for calls with segments, `base` for all others."""

    # lengths differ from batch to batch: compiled, each would be compiled anew
    @torch.compiler.disable
    def attend_row(module, query, key, value, segments, **keywords):
        # those of the row, from which boundaries would be guessed once more
        keywords.pop("position_ids", None)
        segments.once(WINDOWS, set).add(keywords.get("sliding_window"))
        return attend(module, query, key, value, segments, **keywords)

    def attention(
        module, query, key, value, attention_mask, *, segments=None, **keywords
    ):
        if segments is None:
            return base(module, query, key, value, attention_mask, **keywords)
        return attend_row(module, query, key, value, segments, **keywords)

    attention.packs = True  # type: ignore[attr-defined]
    return attention


def _eager(module, query, key, value, attention_mask, **keywords):
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, **keywords)


# --- one call per segment ------------------------------------------------------------


def _per_segment(base: Attention, make_mask: Callable[..., Any]) -> Attention:
    """Queries, keys and values of shape (1, heads, length, size)."""

    def attend(module, query, key, value, segments: Segments, **keywords):
        window, on_cpu = keywords.get("sliding_window"), query.device.type == "cpu"
        keys, values = (states.split(segments.pieces, dim=2) for states in (key, value))
        lengths = [_bands(queries, on_cpu) for queries in segments.queries]
        bands = iter(query.split([n for each in lengths for n in each], dim=2))
        outputs = []
        for each, sees in zip(lengths, segments.keys, strict=True):
            seen = _join(keys, sees), _join(values, sees)
            end = seen[0].shape[2] - sum(each)
            for queries in each:
                end += queries
                mask = _mask(segments, queries, end, window, make_mask, query)
                so_far = (states[:, :, :end] for states in seen)
                outputs.append(base(module, next(bands), *so_far, mask, **keywords)[0])
        return torch.cat(outputs, dim=1), None

    return attend


def _bands(queries: int, on_cpu: bool) -> list[int]:
    """Lengths, about equal, of the parts in which the queries of a segment are taken.

    SDPA's kernel for CPUs computes blocks of 512 keys, even those that a mask hides.
    """
    count = max(1, queries // BAND) if on_cpu else 1
    ends = [queries * i // count for i in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def _join(pieces: tuple[torch.Tensor, ...], which: tuple[int, ...]) -> torch.Tensor:
    if len(which) == 1:
        return pieces[which[0]]
    return torch.cat([pieces[i] for i in which], dim=2)


def _mask(
    segments: Segments,
    queries: int,
    keys: int,
    window: int | None,
    make_mask: Callable[..., Any],
    query: torch.Tensor,
) -> Any:
    """The causal mask of the last queries, None where a kernel's own will do."""
    return segments.once(
        (queries, keys, window, query.dtype, query.device, make_mask),
        lambda: make_mask(
            batch_size=1,
            q_length=queries,
            kv_length=keys,
            q_offset=keys - queries,
            mask_function=_visible(window),
            local_size=window,
            dtype=query.dtype,
            device=query.device,
        ),
    )


def _visible(window: int | None) -> Callable[..., Any]:
    """By position: whether a query sees a key of its segment."""
    if window is None:
        return causal_mask_function
    return sliding_window_causal_mask_function(window)


# --- one call for the row ------------------------------------------------------------


def _gather(states: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Keys or values, segment after segment.

    Args:
        states: Shape (1, heads, length, size).

    Returns:
        Shape (1, heads, keys, size).
    """
    which = tuple(i for keys in segments.keys for i in keys)
    if which == tuple(range(len(segments.pieces))):
        return states
    return _join(states.split(segments.pieces, dim=2), which)


def _flash(base: Attention) -> Attention:
    """FlashAttention: with fewer queries than keys, its causal mask ends with both."""

    def attend(module, query, key, value, segments: Segments, **keywords):
        boundaries = _boundaries(segments, query.device)
        key, value = _gather(key, segments), _gather(value, segments)
        return base(module, query, key, value, None, **{**keywords, **boundaries})

    return attend


def _sdpa(base: Attention) -> Attention:
    """SDPA: `varlen_attn` where it can serve, else segment by segment."""
    loop = _per_segment(base, sdpa_mask)

    def attend(module, query, key, value, segments: Segments, **keywords):
        if _takes_varlen(module, query, value, keywords):
            return _varlen(query, key, value, segments, **keywords)
        with _without_cudnn(query.device):
            return loop(module, query, key, value, segments, **keywords)

    return attend


def _takes_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    value: torch.Tensor,
    keywords: dict[str, Any],
) -> bool:
    """Whether `varlen_attn` computes what SDPA would: its kernel is FlashAttention 2.

    That has no backward for heads of 200 to 224 on some GPUs.
    """
    size, causal = query.shape[-1], keywords.get("is_causal")
    return (
        query.is_cuda
        and not torch.version.hip
        and _dtype_of_kernel(query) in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and size == value.shape[-1]
        and size % 8 == 0
        and (size <= 192 or size == 256)
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and not keywords.get("dropout")
        and not any(keywords.get(name) is not None for name in BEYOND_VARLEN)
        and functional.scaled_dot_product_attention is SDPA
    )


def _dtype_of_kernel(query: torch.Tensor) -> torch.dtype:
    """The type SDPA computes in: autocast casts its arguments, not `varlen_attn`'s."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`varlen_attn`, whose causal mask ends with both queries and keys."""
    dtype, ends = _dtype_of_kernel(query), _boundaries(segments, query.device)
    row = query, _gather(key, segments), _gather(value, segments)
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in row)
    found: Any = varlen_attn(
        query,
        key,
        value,
        ends["cu_seq_lens_q"],
        ends["cu_seq_lens_k"],
        ends["max_length_q"],
        ends["max_length_k"],
        scale=scaling,
        # how many keys before and after a query's own, which a window counts as well
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **varlen_shares_heads(),
    )
    return found[None], None


@contextmanager
def _without_cudnn(device: torch.device) -> Iterator[None]:
    """Within it, SDPA on a GPU leaves cuDNN out, which makes a plan for every shape."""
    switch, allowed = torch.backends.cuda, torch.backends.cuda.cudnn_sdp_enabled()
    switch.enable_cudnn_sdp(allowed and device.type != "cuda")
    try:
        yield
    finally:
        switch.enable_cudnn_sdp(allowed)


def _boundaries(segments: Segments, device: torch.device) -> dict[str, Any]:
    """The keywords of transformers' varlen path, made once per batch."""

    def make() -> dict[str, Any]:
        lengths = segments.queries, segments.key_lengths
        ends = torch.tensor([[0, *accumulate(each)] for each in lengths])
        of_queries, of_keys = on_device(ends.int(), device)
        return {
            "cu_seq_lens_q": of_queries,
            "cu_seq_lens_k": of_keys,
            "max_length_q": max(segments.queries),
            "max_length_k": max(segments.key_lengths),
        }

    return segments.once(("boundaries", device), make)


def _block_masked(base: Attention) -> Attention:
    """FlexAttention: which segment a token is of, and where in it, as tensors."""

    def attend(module, query, key, value, segments: Segments, **keywords):
        window, device = keywords.get("sliding_window"), query.device
        mask = segments.once(
            (window, device), lambda: _block_mask(segments, window, device)
        )
        key, value = _gather(key, segments), _gather(value, segments)
        return base(module, query, key, value, mask, **keywords)

    return attend


def _block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    runs = zip(segments.queries, segments.key_lengths, strict=True)
    of_query, of_key, at_query, at_key = [], [], [], []
    for index, (queries, keys) in enumerate(runs):
        of_query.append(torch.full((queries,), index))
        of_key.append(torch.full((keys,), index))
        at_query.append(torch.arange(keys - queries, keys))
        at_key.append(torch.arange(keys))
    q, k = (on_device(torch.cat(parts), device) for parts in (of_query, of_key))
    at_q, at_k = (on_device(torch.cat(parts), device) for parts in (at_query, at_key))
    visible = _visible(window)

    def sees(batch_idx, head_idx, q_idx, kv_idx):
        same = q[q_idx] == k[kv_idx]
        return same & visible(batch_idx, head_idx, at_q[q_idx], at_k[kv_idx])

    return flex_attention_mask(
        batch_size=1,
        q_length=len(q),
        kv_length=len(k),
        mask_function=sees,
        device=device,
    )
