"""logprobs.py against the naive formula in float64 on the same hidden states."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_edpo import logprobs
from axolotl_edpo.logprobs import Head, token_stats

CASES = {
    "plain": dict(),
    "bias": dict(bias=True),
    "scale": dict(scale=0.25),
    "cap": dict(bias=True, scale=2.0, cap=5.0),
}


def inputs(tokens=37, hidden=24, vocab=113, distance=0.05, bias=False, **head):
    """Two hidden states, `distance` apart, and one trained and one frozen head."""
    g = torch.Generator().manual_seed(1)
    h = torch.randn(tokens, hidden, generator=g)
    ref = h + distance * torch.randn(tokens, hidden, generator=g)
    w = torch.randn(vocab, hidden, generator=g)
    b = torch.randn(vocab, generator=g) if bias else None
    y = torch.randint(vocab, (tokens,), generator=g)
    if tokens > 1:
        y[0], y[-1] = 0, vocab - 1
    return h, ref, Head(w, b, **head), y


def naive(h, ref, head, y, epsilon):
    """The formulas of the module's docstring over full logits."""

    def logits(x):
        out = x @ head.weight.T.to(x.dtype)
        out = out if head.bias is None else out + head.bias.to(x.dtype)
        out = out * head.scale
        return out if head.cap is None else head.cap * torch.tanh(out / head.cap)

    def at_y(x):
        return x.log_softmax(-1).gather(1, y[:, None])[:, 0]

    a, b = logits(h), logits(ref)
    p = a.softmax(-1)
    return (
        at_y(a),
        at_y(b),
        at_y(b + (1 + epsilon) * (a - b)) - at_y(a),
        at_y(b + (1 - epsilon) * (a - b)) - at_y(a),
        (p * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1),
        -(p * a.log_softmax(-1)).sum(-1),
        a.mean(-1),
        (a.argmax(-1) == y).double(),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.5, 0.9])
def test_values_equal_float64(case, epsilon, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 113 * 5)
    monkeypatch.setattr(logprobs, "CAST_ROWS", 50)
    h, ref, head, y = inputs(**CASES[case])
    ours = token_stats(h, ref, head, head, y, epsilon)
    exact = naive(h.double(), ref.double(), head, y, epsilon)
    for name, a, b in zip(ours._fields, ours, exact, strict=True):
        # plus and minus keep their digits relative to their own size
        size = b.abs().max() if name in ("plus", "minus") else 1 + b.abs().max()
        worst = (a - b).abs().max()
        assert worst <= 1e-5 * size, (name, worst.item(), size.item())


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_float64(case, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 113 * 5)
    h, ref, head, y = inputs(**CASES[case])
    leaves = [t for t in (h, head.weight, head.bias) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = torch.linspace(-1, 1, len(y))
    ours = token_stats(h, ref, head, head, y, 0.01).policy_logp
    exact = naive(h.double(), ref.double(), head, y, 0.01)[0]
    got = torch.autograd.grad((ours * weights).sum(), leaves)
    want = torch.autograd.grad((exact * weights).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2e-5, atol=2e-6)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    h, ref, head, y = inputs()
    h.requires_grad_()
    token_stats(h, ref, head, head, y, 0.01).policy_logp.sum().backward()
    assert h.grad.abs().sum() > 0
    assert head.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_policies_give_exactly_zero(dtype):
    h, _, head, y = inputs()
    h, head = h.to(dtype), Head(head.weight.to(dtype))
    stats = token_stats(h, h.clone(), head, head, y, 0.01)
    for values in (stats.plus, stats.minus, stats.kl):
        assert values.tolist() == [0.0] * len(y)


def test_bf16_products_are_not_rounded_to_bf16():
    """Error against float64 on the same bf16 operands is float32's, not bf16's."""
    h, ref, head, y = inputs(hidden=64, distance=0.02)
    h, ref, head = h.bfloat16(), ref.bfloat16(), Head(head.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_stats(h, ref, head, head, y, 0.01)
    exact = naive(h.double(), ref.double(), head, y, 0.01)
    assert (ours.plus - exact[2]).abs().max() <= 1e-5 * exact[2].abs().max()
    assert (ours.policy_logp - exact[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("dtype", "inside"), [(torch.float32, "ieee"), (torch.bfloat16, "tf32")]
)
def test_tf32_is_kept_from_operands_that_it_would_round(dtype, inside, monkeypatch):
    """bf16 has fewer digits than TF32; axolotl sets TF32 on every GPU that has it."""
    matmul, seen = torch.backends.cuda.matmul, []
    monkeypatch.setattr(
        logprobs,
        "_logits",
        lambda *args, logits=logprobs._logits: (
            seen.append(matmul.fp32_precision) or logits(*args)
        ),
    )
    h, ref, head, y = inputs()
    head = Head(head.weight.to(dtype))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        token_stats(h.to(dtype), ref.to(dtype), head, head, y, 0.01)
        assert set(seen) == {inside}
        assert torch.get_float32_matmul_precision() == "high"
        assert (matmul.fp32_precision, matmul.allow_tf32) == ("tf32", True)
    finally:
        torch.set_float32_matmul_precision(before)


def test_logits_of_a_hundred_and_a_large_epsilon_stay_finite():
    h, ref, head, y = inputs(distance=2.0)
    h, ref = 10 * h, 10 * ref
    size = (h @ head.weight.T).abs().max()
    assert size > 100
    ours = token_stats(h, ref, head, head, y, 0.9)
    exact = naive(h.double(), ref.double(), head, y, 0.9)
    assert naive(h, ref, head, y, 0.9)[2].abs().max() > 100
    for a, b in zip(ours, exact, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= 3e-6 * size


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_work_and_carry_a_gradient(tokens):
    h, ref, head, y = inputs(tokens=tokens)
    h.requires_grad_()
    head.weight.requires_grad_()
    stats = token_stats(h, ref, head, head, y, 0.01)
    assert all(values.shape == (tokens,) for values in stats)
    stats.policy_logp.sum().backward()
    assert h.grad.shape == h.shape
    assert (head.weight.grad != 0).any() == (tokens > 0)


def test_shapes_that_do_not_fit_are_refused():
    h, ref, head, y = inputs()
    with pytest.raises(ValueError, match="37 targets for 36 policy"):
        token_stats(h[1:], ref, head, head, y, 0.01)
    with pytest.raises(ValueError, match="vocabulary of 113, reference of 100"):
        token_stats(h, ref, head, Head(head.weight[:100]), y, 0.01)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_tensor_of_tokens_by_vocab_is_ever_alive(monkeypatch):
    tokens, vocab, chunk = 500, 2000, 8
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", vocab * chunk)
    h, ref, head, y = inputs(tokens=tokens, vocab=vocab, hidden=4)
    h.requires_grad_()
    head.weight.requires_grad_()
    with LargestTensor() as seen:
        logp = token_stats(h, ref, head, head, y, 0.01).policy_logp
        logp.sum().backward()
    assert seen.numel <= vocab * max(chunk, 9)
    assert seen.numel < tokens * vocab / 50
