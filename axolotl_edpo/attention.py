"""Attention over a packed row, on top of whatever attention the model uses.

A model of transformers looks its attention up by name (`AttentionInterface`) and hands
it every keyword its forward was given. So a function registered under that name that
finds `segments` among them does the packed row; without them it is the one it replaced,
to the bit:

    flash_attention_2, _3   one varlen call: cu_seqlens of queries and of keys
    flex_attention          one call with a block mask
    sdpa, eager             one call per segment: a dense mask over the row would cost
                            the square of its length

In all of them a segment's keys may outnumber its queries, which then are the last
ones: keys and values of a prompt are used by both answers. The window of a layer is the
keyword `sliding_window`, as FlashAttention gets it; positions within a segment run on,
so it counts what it would count in a sequence of its own.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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

from .batch import Segments, model_inputs, pack, select_completions

# What a layer may be where a row holds several sequences: the others carry a state over
# their boundaries, or see what no keyword of the attention names.
LAYERS = {"full_attention", "sliding_attention"}
# Largest relative difference of a hidden state that is rounding, in 16 bits.
TOLERANCE = 0.1
# Where the cache of a row keeps which windows its layers named.
WINDOWS = "windows"
# `eager` is no registered name: each model brings its own function.
EAGER = "edpo_eager"

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
        AttentionInterface.register(EAGER, _per_segment(_eager, eager_mask))
        AttentionMaskInterface.register(EAGER, eager_mask)
        model.set_attn_implementation(EAGER)
        name = model.config._attn_implementation
    base: Any = ALL_ATTENTION_FUNCTIONS.get(name)
    if not hasattr(base, "packs"):
        AttentionInterface.register(name, _packing(name)(base))
    if not hasattr(ALL_ATTENTION_FUNCTIONS.get(name), "packs"):
        raise PackingError(f"`attn_implementation: {name}` is already replaced")


def _packing(name: str) -> Callable[[Attention], Attention]:
    """What makes an attention of this name take segments."""
    if "flash" in name:
        return _varlen
    if name == "flex_attention":
        return _block_masked
    if name == "sdpa":
        return lambda base: _per_segment(base, sdpa_mask)
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
        window = keywords.get("sliding_window")
        keys, values = (states.split(segments.pieces, dim=2) for states in (key, value))
        outputs = [
            base(
                module,
                own,
                _join(keys, sees),
                _join(values, sees),
                _mask(segments, index, window, make_mask, query),
                **keywords,
            )[0]
            for index, (own, sees) in enumerate(
                zip(query.split(segments.queries, dim=2), segments.keys, strict=True)
            )
        ]
        return torch.cat(outputs, dim=1), None

    return _wrap(base, attend)


def _join(pieces: tuple[torch.Tensor, ...], which: tuple[int, ...]) -> torch.Tensor:
    if len(which) == 1:
        return pieces[which[0]]
    return torch.cat([pieces[i] for i in which], dim=2)


def _mask(
    segments: Segments,
    index: int,
    window: int | None,
    make_mask: Callable[..., Any],
    query: torch.Tensor,
) -> Any:
    """The causal mask of a segment, None where a kernel's own will do."""
    queries, keys = segments.queries[index], segments.key_lengths[index]
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


def _varlen(base: Attention) -> Attention:
    """FlashAttention: with fewer queries than keys, its causal mask ends with both."""

    def attend(module, query, key, value, segments: Segments, **keywords):
        device = query.device
        boundaries = segments.once(device, lambda: _boundaries(segments, device))
        key, value = _gather(key, segments), _gather(value, segments)
        return base(module, query, key, value, None, **{**keywords, **boundaries})

    return _wrap(base, attend)


def _boundaries(segments: Segments, device: torch.device) -> dict[str, Any]:
    """The keywords of transformers' varlen path."""
    made: dict[str, Any] = {}
    for side, lengths in (("q", segments.queries), ("k", segments.key_lengths)):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        made[f"cu_seq_lens_{side}"] = ends.to(device, torch.int32)
        made[f"max_length_{side}"] = max(lengths)
    return made


def _block_masked(base: Attention) -> Attention:
    """FlexAttention: which segment a token is of, and where in it, as tensors."""

    def attend(module, query, key, value, segments: Segments, **keywords):
        window, device = keywords.get("sliding_window"), query.device
        mask = segments.once(
            (window, device), lambda: _block_mask(segments, window, device)
        )
        key, value = _gather(key, segments), _gather(value, segments)
        return base(module, query, key, value, mask, **keywords)

    return _wrap(base, attend)


def _block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    runs = zip(segments.queries, segments.key_lengths, strict=True)
    of_query, of_key, at_query, at_key = [], [], [], []
    for index, (queries, keys) in enumerate(runs):
        of_query.append(torch.full((queries,), index))
        of_key.append(torch.full((keys,), index))
        at_query.append(torch.arange(keys - queries, keys))
        at_key.append(torch.arange(keys))
    q, k = (torch.cat(parts).to(device) for parts in (of_query, of_key))
    at_q, at_k = (torch.cat(parts).to(device) for parts in (at_query, at_key))
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
