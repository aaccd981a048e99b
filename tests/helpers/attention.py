"""Models whose attention takes packed rows, and torch's `varlen_attn` in a loop."""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from axolotl_edpo.models.packed_attention import enable_packing
from helpers import tiny

VOCAB = 64


def twin(
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
    """What torch's varlen_attn is documented to do, one sequence after the other.

    Fewer queries than keys are the last ones. A window is how many keys before and
    after its position a query sees beside the one there; -1 is all.
    """
    ends = [ends.tolist() for ends in (cu_seq_q, cu_seq_k)]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert [ends[0][-1], ends[1][-1]] == [len(query), len(key)]
    lengths = [[end - start for start, end in pairwise(side)] for side in ends]
    assert [max(lengths[0]), max(lengths[1])] == [max_q, max_k]
    assert type(max_q) is type(max_k) is int
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    before, after = (10**6 if size < 0 else size for size in window_size)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(ends[0]), pairwise(ends[1]), strict=True):
        at = torch.arange(k1 - k0)
        distance = at - at[k1 - k0 - (q1 - q0) :, None]
        seen = (distance >= -before) & (distance <= after)
        own = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out.append(scaled_dot_product_attention(*own, attn_mask=seen, scale=scale))
    return torch.cat(out, dim=1).transpose(0, 1)


def varlen(module, query, key, value, attention_mask, scaling=None, **keywords):
    """What transformers makes of flash_attn_varlen_func."""
    assert attention_mask is None and "position_ids" not in keywords
    window = keywords.get("sliding_window") or 0
    found = twin(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        *(keywords[f"cu_seq_lens_{side}"] for side in "qk"),
        *(keywords[f"max_length_{side}"] for side in "qk"),
        scale=scaling,
        window_size=(window - 1, 0),
        enable_gqa=True,
    )
    return found[None], None


AttentionInterface.register("flash_varlen_oracle", varlen)


def model(kind: str = "llama", attention: str = "sdpa", **config):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{"vocab_size": VOCAB, "initializer_range": 0.3, **tiny.SIZES, **config}
    )
    built = AutoModelForCausalLM.from_config(config)
    built.config._attn_implementation = attention
    enable_packing(built)
    return built.eval()
