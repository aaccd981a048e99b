"""packed_attention.py: a packed row gives a sequence what it gets when it is alone."""

import importlib

import pytest
import torch
from helpers import tiny
from helpers.attention import VOCAB, flash_varlen, packing_model, varlen_loop
from helpers.tiers import first
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import axolotl_edpo.models.packed_attention as under_test
from axolotl_edpo.data.completions import completions_of
from axolotl_edpo.data.layout import model_inputs
from axolotl_edpo.data.packing import pack
from axolotl_edpo.models.forward import completion_logits
from axolotl_edpo.models.packed_attention import PackingError, enable_packing
from axolotl_edpo.models.packing_support import check_packing


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
    lm = packing_model(kind, attention, **MODELS[kind])
    found = logps(lm, padded(PAIRS), share)
    sequences = [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]
    plain = packing_model(
        kind, "eager" if attention == "eager" else "sdpa", **MODELS[kind]
    )
    for own, (prompt, answer) in zip(found, sequences, strict=True):
        torch.testing.assert_close(
            own, alone(plain, prompt, answer), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", first(["llama", "gemma2"]))
def test_flex_attention_scores_a_shared_row_alike(kind):
    """Forward only: FlexAttention has no backward on a CPU."""
    lm = packing_model(kind, "flex_attention", **MODELS[kind])
    expected = logps(packing_model(kind, "sdpa", **MODELS[kind]), padded(PAIRS), True)
    if kind == "gemma2":  # which sdpa leaves out
        expected = logps(
            packing_model(kind, "eager", **MODELS[kind]), padded(PAIRS), True
        )
    for own, other in zip(logps(lm, padded(PAIRS), True), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_varlen_oracle"])
def test_no_token_moves_a_sequence_that_it_is_not_in(attention, share):
    lm = packing_model("mistral", attention, sliding_window=5)
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
    lm = packing_model()
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


def test_an_attention_of_unknown_kind_is_refused():
    AttentionInterface.register("some_other", flash_varlen)
    with pytest.raises(PackingError, match="attn_implementation: some_other"):
        packing_model(attention="some_other")


# --- torch's varlen_attn ----------------------------------------------------------


def counted(monkeypatch, function) -> list:
    """The keywords of each call of `function`, which takes varlen_attn's place."""
    calls = []

    def spy(*arrays, **keywords):
        calls.append(keywords)
        return function(*arrays, **keywords)

    monkeypatch.setattr(under_test, "varlen_attn", spy)
    monkeypatch.setattr(under_test, "_takes_varlen", lambda *_: True)
    return calls


def outcome(lm, batch: dict, share: bool) -> list[torch.Tensor]:
    """Logits of a packed row's completions, and the gradient of every weight."""
    row = pack(batch, share)
    logits = completion_logits(lm, model_inputs(row), completions_of(row))
    torch.manual_seed(1)
    weights = list(lm.parameters())
    grads = torch.autograd.grad(logits, weights, torch.randn(logits.shape))
    return [logits.detach(), *grads]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of a tensor from the expected one, in its norm."""
    each = zip(found, expected, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in each)


# a window that cuts, and layers of two kinds
WINDOWED = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
VARLEN = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOWED},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"query_pre_attn_scalar": 50, **WINDOWED},
}


@pytest.mark.parametrize("share", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("kind", VARLEN)
def test_one_varlen_call_per_layer_is_as_good_as_a_call_per_segment(
    kind, share, monkeypatch
):
    lm = packing_model(kind, **VARLEN[kind])
    expected = outcome(lm, padded(PAIRS), share)
    calls = counted(monkeypatch, varlen_loop)
    found = outcome(lm, padded(PAIRS), share)
    assert difference(found, expected) < 1e-5
    windows = {"llama": [None] * 2, "qwen3": [None] * 2, "mistral": [5, 5]}
    before = [w - 1 if w else -1 for w in windows.get(kind, [5, None])]
    assert [call["window_size"] for call in calls] == [(w, 0) for w in before]
    assert {call["scale"] for call in calls} == {
        50**-0.5 if kind == "gemma3_text" else 8**-0.5
    }


@pytest.mark.parametrize("window", [None, 5])
def test_varlen_attn_takes_these_arguments(window, monkeypatch):
    """torch's own function, on tensors without values: shapes, types and names."""
    calls = counted(monkeypatch, varlen_attn)
    lm = packing_model("mistral", sliding_window=window).to("meta", torch.bfloat16)
    row = pack(padded(PAIRS), share=True)
    inputs = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in model_inputs(row).items()
    }
    out = lm(**inputs, use_cache=False).logits
    out.sum().backward()
    assert len(calls) == 2 and out.shape == (1, sum(row["segments"].pieces), VOCAB)
    assert all(w.grad.shape == w.shape for w in lm.parameters())


def test_varlen_is_given_the_type_that_autocast_gives_sdpa(monkeypatch):
    """A rotated query is in float32 where norms are, and the value beside it is not."""
    lm, row = packing_model(), pack(padded(PAIRS), share=True)
    seen = []

    def spy(query, key, value, *arguments, **keywords):
        seen.append({query.dtype, key.dtype, value.dtype})
        return varlen_loop(query, key, value, *arguments, **keywords)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = lm(**model_inputs(row), use_cache=False).logits
        counted(monkeypatch, spy)
        found = lm(**model_inputs(row), use_cache=False).logits
    assert seen == [{torch.bfloat16}] * 2
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_boundaries_are_int32_on_the_device_and_python_integers():
    segments = pack(padded(PAIRS), share=True)["segments"]
    made = under_test._boundaries(segments, torch.device("cpu"))
    assert made["cu_seq_lens_q"].tolist()[:3] == [0, 7, 13]
    assert made["cu_seq_lens_k"].tolist()[:3] == [0, 7, 17]
    assert (made["max_length_q"], made["max_length_k"]) == (16, 16)
    assert made["cu_seq_lens_q"].dtype == torch.int32
    assert made is under_test._boundaries(segments, torch.device("cpu"))


def half(size: int = 64, value: int | None = None, dtype=torch.bfloat16):
    """Query and value on a GPU that need not be there."""
    with FakeTensorMode():
        return (
            torch.empty(1, 4, 8, size, dtype=dtype, device="cuda"),
            torch.empty(1, 2, 8, value or size, dtype=dtype, device="cuda"),
        )


class Layer(torch.nn.Module):
    is_causal = True


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.parametrize("size", [8, 64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_serves_16_bits_on_a_gpu(size, dtype, ampere):
    keywords = {"dropout": 0.0, "scaling": 0.1, "sliding_window": 4, "softcap": None}
    assert under_test._takes_varlen(Layer(), *half(size, dtype=dtype), keywords)


@pytest.mark.parametrize(
    "tensors",
    [
        lambda: half(dtype=torch.float32),
        lambda: half(dtype=torch.float64),
        lambda: half(20),
        lambda: half(216),
        lambda: half(264),
        lambda: half(192, 128),
        lambda: [torch.empty(1, 4, 8, 64, dtype=torch.bfloat16)] * 2,
    ],
    ids=["float32", "float64", "20", "216", "264", "unequal", "cpu"],
)
def test_varlen_does_not_serve_other_tensors(tensors, ampere):
    assert not under_test._takes_varlen(Layer(), *tensors(), {})


@pytest.mark.parametrize(
    "keywords",
    [
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 4, 8, 8)},
        {"is_causal": False},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_varlen_does_not_serve_what_it_has_no_argument_for(keywords, ampere):
    assert not under_test._takes_varlen(Layer(), *half(), keywords)


def test_varlen_does_not_serve_other_machines_or_another_sdpa(monkeypatch, ampere):
    def takes():
        return under_test._takes_varlen(Layer(), *half(), {})

    assert takes()
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "is_causal", False)
        assert not takes()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert not takes()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not takes()
    with monkeypatch.context() as patch:  # as torchao's attention in FP8 does
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", varlen_loop)
        assert not takes()


def test_cudnn_is_left_out_on_a_gpu_only_and_for_as_long():
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    assert allowed()
    with under_test._without_cudnn(torch.device("cuda")):
        assert not allowed()
    assert allowed()
    with under_test._without_cudnn(torch.device("cpu")):
        assert allowed()


@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_axolotls_varlen_for_sdpa_takes_no_row_apart(before, monkeypatch):
    """`sdpa_varlen: true`: it finds sequences by positions that start at 0 again.

    In a shared row a second answer starts at the length of its prompt.
    """
    theirs = importlib.import_module("axolotl.monkeypatch.attention.sdpa_varlen")
    mapping, plain = AttentionInterface._global_mapping, packing_model()
    first = mapping["sdpa"] if before else sdpa_attention_forward
    monkeypatch.setitem(mapping, "sdpa", first)
    assert theirs.patch_sdpa_varlen()
    try:
        assert not hasattr(mapping["sdpa"], "packs")
        found = logps(packing_model(), padded(PAIRS), True)
        assert hasattr(mapping["sdpa"], "packs")
    finally:
        theirs.unpatch_sdpa_varlen()
    monkeypatch.undo()
    sequences = [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]
    for own, (prompt, answer) in zip(found, sequences, strict=True):
        torch.testing.assert_close(
            own, alone(plain, prompt, answer), rtol=1e-5, atol=1e-5
        )


# --- long segments on a CPU -------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_bands_of_a_long_segment_see_what_it_sees(kind, attention, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    batch = padded([(tokens(9), tokens(40), tokens(33)), (tokens(1), [5], tokens(4))])
    lm = packing_model(
        kind, attention, sliding_window=20 if kind == "mistral" else None
    )
    expected = outcome(lm, batch, True)
    monkeypatch.setattr(under_test, "BAND", 10)
    found = outcome(lm, batch, True)
    assert difference(found, expected) < 1e-5


def test_bands_are_about_equal_and_on_a_cpu_only():
    bands = {n: under_test._bands(n, on_cpu=True) for n in (1, 127, 255, 256, 700)}
    assert [bands[n] for n in (1, 127, 255, 256)] == [[1], [127], [255], [128, 128]]
    assert bands[700] == [140, 140, 140, 140, 140]
    assert under_test._bands(700, on_cpu=False) == [700]


# --- on a GPU ---------------------------------------------------------------------


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


def on_gpu(kind: str, **config):
    sizes = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}
    return packing_model(kind, **sizes, **config).to("cuda", torch.bfloat16)


def operations(lm, batch: dict) -> tuple[list[torch.Tensor], str]:
    """Hidden states and gradients of a packed row, and the operations of torch."""
    row = pack(batch, share=True)
    inputs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in model_inputs(row).items()
    }
    with torch.profiler.profile() as profile:
        out = lm.base_model(**inputs, use_cache=False).last_hidden_state
        torch.manual_seed(1)
        weights = list(lm.base_model.parameters())
        grads = torch.autograd.grad(out, weights, torch.randn(out.shape).to(out))
    return [out.detach(), *grads], " ".join(event.name for event in profile.events())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", VARLEN)
def test_on_a_gpu_varlen_is_as_good_as_the_loop_and_neither_asks_cudnn(
    kind, monkeypatch
):
    lm = on_gpu(kind, **VARLEN[kind])
    found, names = operations(lm, padded(PAIRS))
    assert "_varlen_attn" in names and "_varlen_attn_backward" in names
    assert "cudnn_attention" not in names
    monkeypatch.setattr(under_test, "_takes_varlen", lambda *_: False)
    expected, names = operations(lm, padded(PAIRS))
    assert "scaled_dot_product" in names and "cudnn_attention" not in names
    assert difference(found, expected) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_boundaries_wait_for_nothing():
    segments = pack(padded(PAIRS), share=True)["segments"]
    device = torch.zeros(1, device="cuda").device
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = under_test._boundaries(segments, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made["cu_seq_lens_q"].tolist()[:3] == [0, 7, 13]
