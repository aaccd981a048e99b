"""Stands in for flash-attn, whose wheel is too large to bring along.

The calls that transformers makes, over `torch.nn.attention.varlen`, which runs the same
FlashAttention-2 kernels. What those do not take (dropout, soft cap, ALiBi, a KV cache)
is refused.
"""

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

__version__ = "2.8.3"

# torch 2.11 shares keys among queries unasked and does not know the keyword
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters
    else {}
)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    **others: Any,
) -> torch.Tensor:
    """Attention of sequences that follow each other in one row.

    Args:
        q: Shape (queries, heads, size).
        k: Shape (keys, key heads, size).
        v: Likewise.
        cu_seqlens_q: Shape (sequences + 1,), where each one's queries begin.
        cu_seqlens_k: Likewise, of its keys.
        max_seqlen_q: Most queries of a sequence.
        max_seqlen_k: Most keys of a sequence.
        dropout_p: 0.
        softmax_scale: Factor on the scores.
        causal: Whether the last query sees all keys, the one before one less.
        window_size: Keys seen before and after; -1: all.
        softcap: 0.
        **others: None of them set.

    Returns:
        Shape (queries, heads, size).

    Raises:
        NotImplementedError: If torch's kernels do not take what is asked for.
    """
    asked = [name for name, value in others.items() if value not in (None, False)]
    asked += ["dropout_p"] * bool(dropout_p) + ["softcap"] * bool(softcap)
    if asked:
        raise NotImplementedError(f"torch's kernels have no {', '.join(asked)}")
    left, right = window_size
    return varlen_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        window_size=(left, 0 if causal else right),
        **_GROUPED,
    )


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *positional: Any, **keywords: Any
) -> torch.Tensor:
    """The same for a batch: q of shape (batch, queries, heads, size)."""
    batch, queries, keys = len(q), q.shape[1], k.shape[1]

    def starts(length: int) -> torch.Tensor:
        whole = (batch + 1) * length
        return torch.arange(0, whole, length, dtype=torch.int32, device=q.device)

    rows = (x.flatten(0, 1) for x in (q, k, v))
    lengths = starts(queries), starts(keys), queries, keys
    out = flash_attn_varlen_func(*rows, *lengths, *positional, **keywords)
    return out.unflatten(0, (batch, queries))


def flash_attn_with_kvcache(*args: Any, **keywords: Any) -> torch.Tensor:
    """Generates; not here."""
    raise NotImplementedError("no KV cache")
