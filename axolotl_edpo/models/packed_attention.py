"""Attention over packed rows, for each attention implementation of transformers.

A transformers model finds its attention function by name (`AttentionInterface`), and
passes it every keyword of its forward. `enable_packing` replaces the function of this
name. Without the keyword `segments`, the new function calls the replaced one. With
`segments`, it computes the attention of a packed row:

    flash_attention_2, _3   one varlen call: boundaries of queries and of keys
    flex_attention          one call with a block mask
    sdpa on a GPU, 16 bits  one call of torch's `varlen_attn` with the same boundaries,
                            if `_takes_varlen`
    sdpa elsewhere, eager   on a GPU one call per segment, without cuDNN; on a CPU one
                            call per `BAND` queries of a segment. A dense mask over the
                            row would need the square of its length

A segment can have more keys than queries: both completions of a pair use the keys and
values of their shared prefix. The queries are the last tokens of the segment. The
keyword `sliding_window` is the window of a layer. The keys of a segment have
consecutive positions, so a window covers the same keys as in a padded batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
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
from ..data.segments import Segments
from ..upstream import attention_name, eager_attention, varlen_shares_heads
from .split_row import SplitRow

# The name of an eager attention that takes segments. `eager` cannot be replaced: it is
# not a registered name, because each model has its own function.
EAGER = "edpo_eager"
# torch's function. FP8 attention replaces it during a forward.
SDPA = functional.scaled_dot_product_attention
# Keywords of attention functions that `varlen_attn` does not support.
BEYOND_VARLEN = ("softcap", "s_aux", "position_bias")
# On a CPU, about this many queries of a segment are computed in one call. So the first
# queries of a long segment are not multiplied with its last keys.
BAND = 128

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class PackingError(ValueError):
    """A model cannot run packed rows; the message says why."""


def enable_packing(model: PreTrainedModel) -> None:
    """Replaces the attention of a model by one that takes the keyword `segments`.

    This affects all models of the process with the same `attn_implementation`. Without
    `segments` the results do not change. A second call has no effect.

    Args:
        model: A causal language model.

    Raises:
        PackingError: If this attention cannot compute packed rows.
    """
    name = attention_name(model.config)
    if name == "eager":
        packed = _with_segments(
            eager_attention, _per_segment(eager_attention, eager_mask)
        )
        AttentionInterface.register(EAGER, packed)
        AttentionMaskInterface.register(EAGER, eager_mask)
        model.set_attn_implementation(EAGER)
        name = attention_name(model.config)
    base: Any = ALL_ATTENTION_FUNCTIONS.get(name)
    if not hasattr(base, "packs"):
        packed = _with_segments(base, _packed_version(name)(base))
        AttentionInterface.register(name, packed)
    if not hasattr(ALL_ATTENTION_FUNCTIONS.get(name), "packs"):
        raise PackingError(f"`attn_implementation: {name}` is already replaced")


def _packed_version(name: str) -> Callable[[Attention], Attention]:
    """The function that extends the attention of this name to packed rows."""
    if "flash" in name:
        return _flash
    if name == "flex_attention":
        return _block_masked
    if name == "sdpa":
        return _sdpa
    raise PackingError(f"`attn_implementation: {name}` has no boundaries in a row")


def _with_segments(base: Attention, attend: Attention) -> Attention:
    """An attention that calls `attend` if it gets `segments`, and else `base`.

    If it gets a `SplitRow`, `attend` gets the whole row and a share of the heads.
    """

    # not compiled: the lengths differ in every batch, and each would be compiled
    @torch.compiler.disable
    def attend_row(module, query, key, value, segments, **keywords):
        if isinstance(segments, SplitRow):
            row = module, query, key, value
            return segments.attend(attend_row, *row, **keywords)
        # from these, transformers would infer boundaries that are wrong here
        keywords.pop("position_ids", None)
        segments.cache.windows.add(keywords.get("sliding_window"))
        return attend(module, query, key, value, segments, **keywords)

    def attention(
        module, query, key, value, attention_mask, *, segments=None, **keywords
    ):
        if segments is None:
            return base(module, query, key, value, attention_mask, **keywords)
        return attend_row(module, query, key, value, segments, **keywords)

    attention.packs = True  # type: ignore[attr-defined]
    return attention


# --- one call per segment ------------------------------------------------------------


def _per_segment(base: Attention, make_mask: Callable[..., Any]) -> Attention:
    """SDPA or eager attention, called for each band of queries of each segment.

    Queries, keys and values have shape (1, heads, length, size).
    """

    def attend(module, query, key, value, segments: Segments, **keywords):
        window = keywords.get("sliding_window")
        outputs = []
        for queries, keys, values in _walk_bands(query, key, value, segments):
            lengths = queries.shape[2], keys.shape[2]
            mask = _mask(segments, *lengths, window, make_mask, query)
            output, _ = base(module, queries, keys, values, mask, **keywords)
            outputs.append(output)
        return torch.cat(outputs, dim=1), None

    return attend


def _walk_bands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields for each band its queries, and the keys and values up to its last one."""
    on_cpu = query.device.type == "cpu"
    keys, values = (states.split(segments.pieces, dim=2) for states in (key, value))
    lengths = [_bands(queries, on_cpu) for queries in segments.queries]
    bands = iter(query.split([*chain(*lengths)], dim=2))
    for segment_lengths, pieces in zip(lengths, segments.keys, strict=True):
        segment_keys, segment_values = _join(keys, pieces), _join(values, pieces)
        end = segment_keys.shape[2] - sum(segment_lengths)
        for length in segment_lengths:
            end += length
            yield next(bands), segment_keys[:, :, :end], segment_values[:, :, :end]


def _bands(queries: int, on_cpu: bool) -> list[int]:
    """Number of queries in each band of a segment. On a GPU there is one band.

    SDPA's CPU kernel computes all keys, also those that the mask hides. Bands avoid it.
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
    """The causal mask of the last queries of a segment; None: `is_causal` is enough."""
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
    """transformers' mask function: whether a query position sees a key position."""
    if window is None:
        return causal_mask_function
    return sliding_window_causal_mask_function(window)


# --- one call for the row ------------------------------------------------------------


def _gather(states: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The keys or values of all segments, segment after segment.

    Args:
        states: Shape (1, heads, length, size).

    Returns:
        Shape (1, heads, keys, size).
    """
    pieces = tuple(piece for keys in segments.keys for piece in keys)
    if pieces == tuple(range(len(segments.pieces))):
        return states

    def compute() -> torch.Tensor:
        positions = torch.arange(sum(segments.pieces)).split(segments.pieces)
        return on_device(torch.cat([positions[i] for i in pieces]), states.device)

    index = segments.once((_gather, states.device), compute)
    # one kernel, and two in the backward, however many pieces there are
    return states.transpose(1, 2).index_select(1, index).transpose(1, 2)


def _flash(base: Attention) -> Attention:
    """FlashAttention with boundaries. The last query of a segment sees the last key."""

    def attend(module, query, key, value, segments: Segments, **keywords):
        boundaries = _boundaries(segments, query.device)
        key, value = _gather(key, segments), _gather(value, segments)
        return base(module, query, key, value, None, **{**keywords, **boundaries})

    return attend


def _sdpa(base: Attention) -> Attention:
    """SDPA: `varlen_attn` if it computes the same, else one call per segment."""
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
    """Whether `varlen_attn` computes what SDPA would.

    Its kernel is FlashAttention 2. On some GPUs that has no backward for heads of size
    200 to 224.
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
    """The dtype of SDPA. Autocast casts SDPA's arguments, but not `varlen_attn`'s."""
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
    """torch's `varlen_attn`. The last query of a segment sees the last key."""
    dtype, ends = _dtype_of_kernel(query), _boundaries(segments, query.device)
    row = query, _gather(key, segments), _gather(value, segments)
    query, key, value = (x.squeeze(0).transpose(0, 1).to(dtype) for x in row)
    output: Any = varlen_attn(
        query,
        key,
        value,
        ends["cu_seq_lens_q"],
        ends["cu_seq_lens_k"],
        ends["max_length_q"],
        ends["max_length_k"],
        scale=scaling,
        # numbers of keys before and after the query; `sliding_window` counts it too
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **varlen_shares_heads(),
    )
    return output.unsqueeze(0), None


@contextmanager
def _without_cudnn(device: torch.device) -> Iterator[None]:
    """Within it, SDPA does not use cuDNN, which plans anew for every shape."""
    backend, allowed = torch.backends.cuda, torch.backends.cuda.cudnn_sdp_enabled()
    backend.enable_cudnn_sdp(allowed and device.type != "cuda")
    try:
        yield
    finally:
        backend.enable_cudnn_sdp(allowed)


def _boundaries(segments: Segments, device: torch.device) -> dict[str, Any]:
    """Where segments begin and end, as keywords of transformers' FlashAttention."""

    def compute() -> dict[str, Any]:
        lengths = segments.queries, segments.key_lengths
        ends = torch.tensor([[0, *accumulate(counts)] for counts in lengths])
        query_ends, key_ends = on_device(ends.int(), device)
        return {
            "cu_seq_lens_q": query_ends,
            "cu_seq_lens_k": key_ends,
            "max_length_q": max(segments.queries),
            "max_length_k": max(segments.key_lengths),
        }

    return segments.once(("boundaries", device), compute)


def _block_masked(base: Attention) -> Attention:
    """FlexAttention with a block mask for the whole row."""

    def attend(module, query, key, value, segments: Segments, **keywords):
        window, device = keywords.get("sliding_window"), query.device
        mask = segments.once(
            (window, device), lambda: _block_mask(segments, window, device)
        )
        key, value = _gather(key, segments), _gather(value, segments)
        return base(module, query, key, value, mask, **keywords)

    return attend


def _block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """The block mask of a row: a query sees the earlier keys of its segment."""
    query_segment, query_position = _numbered(
        segments.queries, segments.key_lengths, device
    )
    key_segment, key_position = _numbered(
        segments.key_lengths, segments.key_lengths, device
    )
    visible = _visible(window)

    def sees(batch_idx, head_idx, q_idx, kv_idx):
        same_segment = query_segment[q_idx] == key_segment[kv_idx]
        positions = query_position[q_idx], key_position[kv_idx]
        return same_segment & visible(batch_idx, head_idx, *positions)

    return flex_attention_mask(
        batch_size=1,
        q_length=len(query_segment),
        kv_length=len(key_segment),
        mask_function=sees,
        device=device,
    )


def _numbered(
    counts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment of each token, and its position in the segment.

    Args:
        counts: For each segment: how many of its last tokens to number.
        lengths: For each segment: its number of keys.
        device: Of the result.

    Returns:
        Segments and positions, each of shape (sum of counts,).
    """
    segments = torch.repeat_interleave(torch.tensor(counts))
    both = zip(counts, lengths, strict=True)
    positions = [torch.arange(length - count, length) for count, length in both]
    return on_device(segments, device), on_device(torch.cat(positions), device)
