"""attention.py: a packed row gives each sequence what it gets when it is alone."""

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, LlamaConfig, MambaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from axolotl_edpo.attention import (
    PackingError,
    check_layers,
    check_packing,
    enable_packing,
)
from axolotl_edpo.backbone import completion_logits
from axolotl_edpo.batch import completions_of, model_inputs, pack

VOCAB = 64


def varlen(module, query, key, value, attention_mask, scaling=None, **keywords):
    """What flash_attn_varlen_func is documented to do, one sequence after the other.

    Fewer queries than keys are the last ones; the window counts back from the query.
    """
    assert attention_mask is None and "position_ids" not in keywords
    ends = [keywords[f"cu_seq_lens_{side}"].tolist() for side in "qk"]
    lengths = [torch.tensor(list_).diff().max().item() for list_ in ends]
    assert lengths == [keywords["max_length_q"], keywords["max_length_k"]]
    window = keywords.get("sliding_window") or 10**6
    key, value = (
        states.repeat_interleave(module.num_key_value_groups, dim=1)
        for states in (key, value)
    )
    out = []
    for q0, q1, k0, k1 in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        behind = (
            torch.arange(k1 - k0) - torch.arange(k1 - k0 - q1 + q0, k1 - k0)[:, None]
        )
        seen = (behind <= 0) & (behind > -window)
        own = query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1]
        out.append(scaled_dot_product_attention(*own, attn_mask=seen, scale=scaling))
    return torch.cat(out, dim=2).transpose(1, 2), None


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


def padded(pairs: list[tuple[list[int], list[int], list[int]]]) -> dict:
    """A batch of (prompt, chosen, rejected)."""
    sequences = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    length = max(len(p) + len(answer) for p, answer in sequences)
    rows = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, answer in sequences:
        filling = length - len(prompt) - len(answer)
        rows["input_ids"].append(prompt + answer + [0] * filling)
        rows["attention_mask"].append([1] * (length - filling) + [0] * filling)
        mask = [0] * len(prompt) + [1] * len(answer) + [0] * filling
        rows["completion_mask"].append(mask)
    return {name: torch.tensor(values) for name, values in rows.items()}


PAIRS = [
    ([5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]),
    ([20, 21], [22], [23, 24]),
    ([30, 31, 32, 33, 34, 35, 36], [37, 38, 39, 40, 41, 42, 43, 44, 45], [46]),
    ([50, 51], [52, 53, 54], [52, 53, 55]),  # alike beyond the prompt
]


@torch.no_grad()
def logps(lm, batch: dict, share: bool, **keywords) -> list[torch.Tensor]:
    """Log-probabilities of each sequence's completion, from one packed row."""
    row = pack(batch, share, **keywords)
    completions = completions_of(row)
    logits = completion_logits(lm, model_inputs(row), completions)
    found = logits.log_softmax(-1).gather(1, completions.targets[:, None])[:, 0]
    return list(found.split(completions.lengths.tolist()))


@torch.no_grad()
def alone(lm, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The same of one sequence, as transformers computes it without this package."""
    ids = torch.tensor([prompt + answer])
    scores = lm(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


MODELS = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5},
}


# the oracle has no soft cap on attention scores
WAYS = [(kind, way) for kind in MODELS for way in ("sdpa", "eager")]
WAYS += [(kind, "flash_varlen_oracle") for kind in MODELS if kind != "gemma2"]


@pytest.mark.parametrize("share", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize(("kind", "attention"), WAYS)
def test_a_sequence_in_a_row_is_scored_as_if_it_were_alone(kind, attention, share):
    lm = model(kind, attention, **MODELS[kind])
    found = logps(lm, padded(PAIRS), share)
    sequences = [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]
    plain = model(kind, "eager" if attention == "eager" else "sdpa", **MODELS[kind])
    for own, (prompt, answer) in zip(found, sequences, strict=True):
        torch.testing.assert_close(
            own, alone(plain, prompt, answer), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_flex_attention_scores_a_shared_row_alike(kind):
    """Forward only: FlexAttention has no backward on a CPU."""
    lm = model(kind, "flex_attention", **MODELS[kind])
    expected = logps(model(kind, "sdpa", **MODELS[kind]), padded(PAIRS), True)
    if kind == "gemma2":  # which sdpa leaves out
        expected = logps(model(kind, "eager", **MODELS[kind]), padded(PAIRS), True)
    for own, other in zip(logps(lm, padded(PAIRS), True), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_varlen_oracle"])
def test_no_token_moves_a_sequence_that_it_is_not_in(attention, share):
    lm = model("mistral", attention, sliding_window=5)
    before = logps(lm, padded(PAIRS), share)
    moved = 0
    for pair, parts in enumerate(PAIRS):
        for part, tokens in enumerate(parts):
            for place in range(len(tokens)):
                changed = [[list(tokens) for tokens in parts] for parts in PAIRS]
                changed[pair][part][place] = 60
                after = logps(lm, padded(changed), share)
                holds = {0: (pair, pair + 4), 1: (pair,), 2: (pair + 4,)}[part]
                for sequence in range(8):
                    same = torch.equal(before[sequence], after[sequence])
                    moved += not same
                    assert same or sequence in holds, (pair, part, place, sequence)
    # prompts move both, chosen and rejected their own, but for what the window hides
    assert moved >= sum(2 * len(p) + len(c) + len(r) for p, c, r in PAIRS) - 8


def test_filling_up_to_a_multiple_moves_nothing():
    lm = model()
    plain = logps(lm, padded(PAIRS), True)
    filled = logps(lm, padded(PAIRS), True, multiple=64)
    for a, b in zip(plain, filled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_without_segments_the_attention_is_the_one_it_was_to_the_bit():
    ids = torch.arange(5, 45).view(2, 20)
    config = LlamaConfig(vocab_size=VOCAB, **tiny.SIZES)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    packing = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    packing.load_state_dict(plain.state_dict())
    enable_packing(packing)
    enable_packing(packing)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask).logits for m in (plain, packing))
    assert torch.equal(a, b)
    assert "attn_implementation" not in packing.config.to_json_string()


def test_a_row_taken_for_one_sequence_is_noticed(monkeypatch):
    """What check_packing is for: an attention that ignores the segments."""
    lm = model()
    check_packing(lm, share=True)
    AttentionInterface.register(
        "deaf", lambda *a, segments=None, **k: varlen_of_one(*a, **k)
    )
    lm.config._attn_implementation = "deaf"
    for share in (True, False):
        with pytest.raises(PackingError, match="change each other.*%"):
            check_packing(lm, share)


def varlen_of_one(module, query, key, value, attention_mask, **keywords):
    """Causal over the whole row."""
    count = torch.tensor([0, query.shape[2]])
    keywords = {name: keywords[name] for name in ("scaling",)}
    return varlen(
        module,
        query,
        key,
        value,
        None,
        cu_seq_lens_q=count,
        cu_seq_lens_k=count,
        max_length_q=query.shape[2],
        max_length_k=query.shape[2],
        **keywords,
    )


def test_layers_that_are_no_plain_attention_are_named():
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)
    )
    with pytest.raises(PackingError, match="carry a state or a mask \\(linear_att"):
        check_layers(type(mamba), mamba.config)
    lm = model()
    lm.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(PackingError, match="linear_attention"):
        check_layers(type(lm), lm.config)
    lm.config.layer_types = None
    lm.config.attention_chunk_size = 8
    with pytest.raises(PackingError, match="no boundaries"):
        check_layers(type(lm), lm.config)


def test_an_attention_of_unknown_kind_is_refused():
    AttentionInterface.register("some_other", varlen)
    with pytest.raises(PackingError, match="attn_implementation: some_other"):
        model(attention="some_other")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_on_a_gpu_a_row_is_scored_like_a_padded_batch(kind, attention, share):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "hidden_size": 256, "head_dim": 64}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **sizes)
    config.sliding_window = 5 if kind == "mistral" else None
    lm = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.bfloat16
    ).cuda()
    enable_packing(lm)
    check_packing(lm, share)
