"""Small models that take packed rows, and `varlen_attn` as a plain loop."""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from axolotl_edpo.models.packed_attention import enable_packing
from axolotl_edpo.upstream import varlen_shares_heads
from helpers import tiny

VOCAB = 64


def varlen_loop(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """torch's `varlen_attn` as documented, one sequence after the other.

    If a sequence has fewer queries than keys, they stand at its last positions.

    Args:
        query: Shape (tokens, heads, head size); `key` and `value` have the same with
            their own number of tokens and heads.
        key: See `query`.
        value: See `query`.
        cu_seq_q: Where each sequence of queries begins, and where the last one ends,
            int32; `cu_seq_k` says it of keys.
        cu_seq_k: See `cu_seq_q`.
        max_q: Queries of the longest sequence; `max_k` counts its keys.
        max_k: See `max_q`.
        scale: Factor of the scores; by default that of torch.
        window_size: How many keys before and after its own position a query sees; -1
            for all.
        enable_gqa: Whether there may be fewer heads of keys than of queries.

    Returns:
        Shape (tokens, heads, head size).
    """
    ends = [ends.tolist() for ends in (cu_seq_q, cu_seq_k)]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert [ends[0][-1], ends[1][-1]] == [len(query), len(key)]
    lengths = [[end - start for start, end in pairwise(side)] for side in ends]
    assert [max(lengths[0]), max(lengths[1])] == [max_q, max_k]
    assert type(max_q) is type(max_k) is int
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1 or not varlen_shares_heads()
    before, after = (10**6 if size < 0 else size for size in window_size)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(ends[0]), pairwise(ends[1]), strict=True):
        at = torch.arange(k1 - k0)
        distance = at - at[k1 - k0 - (q1 - q0) :, None]
        seen = (distance >= -before) & (distance <= after)
        parts = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out.append(scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale))
    return torch.cat(out, dim=1).transpose(0, 1)


def flash_varlen(module, query, key, value, attention_mask, scaling=None, **keywords):
    """An attention of transformers that calls `varlen_loop` as FlashAttention's.

    transformers finds it by the name `flash_varlen_oracle`.
    """
    assert attention_mask is None and "position_ids" not in keywords
    window = keywords.get("sliding_window") or 0
    out = varlen_loop(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        *(keywords[f"cu_seq_lens_{side}"] for side in "qk"),
        *(keywords[f"max_length_{side}"] for side in "qk"),
        scale=scaling,
        window_size=(window - 1, 0),
        enable_gqa=True,
    )
    return out[None], None


AttentionInterface.register("flash_varlen_oracle", flash_varlen)


def packing_model(kind: str = "llama", attention: str = "sdpa", **config):
    """A random model that takes packed rows; the same weights each time.

    Args:
        kind: As `model_type` of transformers.
        attention: As `attn_implementation` of transformers.
        **config: Config keys that differ from `tiny.SIZES`.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{"vocab_size": VOCAB, "initializer_range": 0.3, **tiny.SIZES, **config}
    )
    lm = AutoModelForCausalLM.from_config(config)
    lm.config._attn_implementation = attention
    enable_packing(lm)
    return lm.eval()
