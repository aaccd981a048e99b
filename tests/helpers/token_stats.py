"""Inputs of the op, and its naive formula."""

from functools import partial

import torch

from axolotl_edpo.ops.lm_head import Head, LowRank
from axolotl_edpo.ops.token_stats import TokenStats

NAMES = TokenStats._fields

# Float32 rounding of sums over this vocabulary. That of `plus` and `minus` is relative
# to their size. That of the others is relative to the size of the logits, whose last
# digit is a relative error of every probability, and so of the gradient.
RELATIVE_TO_VALUE = 1e-5
RELATIVE_TO_LOGITS = 1e-6


def inputs(
    tokens=5,
    hidden=24,
    vocab=61,
    distance=0.05,
    size=1.0,
    bias=False,
    rank=0,
    dtype=torch.float32,
    device="cpu",
    **after,
):
    """Hidden states of policy and reference, `distance` apart, a head, targets.

    Targets begin and end with both ends of the vocabulary.
    """
    g = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=g)
    h = size * draw(tokens, hidden)
    ref = h + size * distance * draw(tokens, hidden)
    y = torch.randint(vocab, (tokens,), generator=g)
    if tokens > 1:
        y[0], y[-1] = 0, vocab - 1
    h, ref, w, b, up, down = (
        t.to(device, dtype)
        for t in (
            h,
            ref,
            draw(vocab, hidden),
            draw(vocab),
            draw(vocab, rank),
            draw(rank, hidden),
        )
    )
    lora = (LowRank(lambda x: x @ down.T, up),) if rank else ()
    head = Head(w, b if bias else None, lora=lora, **after)
    return h, ref, head, y.to(device)


def naive(h, ref, head, y, epsilon, dtype=torch.float64):
    """The formulas of the module's docstring over full logits in a dtype."""

    def logits(x):
        x = x.to(dtype)
        out = x @ head.weight.T.to(dtype)
        for adapter in head.lora:
            low = adapter.down(x.to(adapter.up.dtype)).to(dtype)
            out = out + low @ adapter.up.T.to(dtype)
        out = out if head.bias is None else out + head.bias.to(dtype)
        out = out * head.scale
        return out if head.cap is None else head.cap * torch.tanh(out / head.cap)

    def at_y(x):
        return x.log_softmax(-1).gather(1, y[:, None])[:, 0]

    a, b = logits(h), logits(ref)
    p = a.softmax(-1)
    return TokenStats(
        at_y(a),
        at_y(b),
        at_y(b + (1 + epsilon) * (a - b)) - at_y(a),
        at_y(b + (1 - epsilon) * (a - b)) - at_y(a),
        (p * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1),
        -(p * a.log_softmax(-1)).sum(-1),
        a.mean(-1),
        (a.argmax(-1) == y).to(dtype),
        (p**2).sum(-1),
    )


def assert_as_exact_as_pytorch(ours, plain, exact, logit_size):
    """|ours - exact| <= |PyTorch in that dtype - exact| + float32 rounding."""
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=True):
        error, allowed = (a - c).abs().max(), (b - c).abs().max()
        if name in ("plus", "minus"):
            rounding = RELATIVE_TO_VALUE * c.abs().max()
        else:
            rounding = RELATIVE_TO_LOGITS * (1 + logit_size)
        assert error <= allowed + rounding, (name, error.item(), allowed.item())


def gradients(logp, leaves):
    """Gradients by the leaves of a sum of log-probabilities with unlike weights."""
    weights = torch.linspace(-1, 1, len(logp), device=logp.device)
    return torch.autograd.grad((logp * weights).sum(), leaves)
