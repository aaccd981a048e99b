"""The head: everything ε-DPO needs of two logit vectors, position by position.

With h = h_θ and h_ref the logits of policy and reference at one position, y the token
that follows, d = h - h_ref and p = softmax(h):

    policy_logp     h[y] - logsumexp(h)                                gradient
    reference_logp  h_ref[y] - logsumexp(h_ref)
    plus, minus     ±ε d[y] - log Σ_v p_v e^(±ε d_v)
    kl              Σ_v p_v d_v + log Σ_v p_v e^(-d_v)

`plus` and `minus` are log π_{1±ε}(y) - log π_θ(y) for the perturbed policies
softmax(h_ref + (1±ε) d) of Proposition 1, https://arxiv.org/abs/2502.13177. Only their
signs, summed over a pair, are used, and they are ε times a small number, so they are
never formed as a difference of two log-softmaxes: that loses the sign in bf16 and
often in float32. d = 0 gives exactly 0.

Logits are float32 products of the hidden states and are formed in chunks of positions,
in forward and again in backward, so no (tokens x vocab) tensor is ever alive.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Logits alive at once per model: 2**24 float32 values are 64 MiB.
CHUNK_LOGITS = 2**24
# Rows of the head cast to float32 at once.
CAST_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """A linear head and what its model does to the logits after it.

    logits = cap · tanh(scale · (weight @ hidden + bias) / cap), no cap where None.

    Attributes:
        weight: Shape (vocab, hidden).
        bias: Shape (vocab,) or None.
        scale: Factor on the logits (Cohere, Granite, Falcon-H1).
        cap: Soft cap (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None


class TokenStats(NamedTuple):
    """Per completion token, each of shape (tokens,) and float32.

    Attributes:
        policy_logp: log π_θ(y), nats, with gradient.
        reference_logp: log π_ref(y), nats.
        plus: log π_{1+ε}(y) - log π_θ(y), nats.
        minus: log π_{1-ε}(y) - log π_θ(y), nats.
        kl: KL(π_θ || π_ref) over the vocabulary, nats.
        entropy: of π_θ, nats.
        mean_logit: mean of h over the vocabulary.
        hit: 1 where the most likely token is y, else 0.
    """

    policy_logp: torch.Tensor
    reference_logp: torch.Tensor
    plus: torch.Tensor
    minus: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    mean_logit: torch.Tensor
    hit: torch.Tensor


def token_stats(
    policy_hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    policy_head: Head,
    reference_head: Head,
    targets: torch.Tensor,
    epsilon: float,
) -> TokenStats:
    """Scores completion tokens under policy, reference and both perturbed policies.

    Equals, with log_softmax taken of the full logits in exact arithmetic,

        policy_logp = log_softmax(h)[y]
        plus, minus = log_softmax(h_ref + (1 ± ε)(h - h_ref))[y] - policy_logp

    Args:
        policy_hidden: Shape (tokens, hidden); gradient flows to it.
        reference_hidden: Shape (tokens, hidden).
        policy_head: Gradient flows to its weight and bias where they require it.
        reference_head: Same vocabulary.
        targets: Shape (tokens,), int64.
        epsilon: Perturbation, 0 < ε < 1.

    Returns:
        One value per token for each statistic. Without tokens, empty tensors that
        still carry a (zero) gradient.

    Raises:
        ValueError: If shapes or vocabularies do not fit.
    """
    vocab, tokens = policy_head.weight.shape[0], targets.shape[0]
    if reference_head.weight.shape[0] != vocab:
        raise ValueError(
            f"policy has a vocabulary of {vocab}, reference of "
            f"{reference_head.weight.shape[0]}: use a reference with the same head"
        )
    if policy_hidden.shape[0] != tokens or reference_hidden.shape[0] != tokens:
        raise ValueError(
            f"{tokens} targets for {policy_hidden.shape[0]} policy and "
            f"{reference_hidden.shape[0]} reference positions"
        )
    return TokenStats(
        *_TokenStats.apply(
            policy_hidden,
            policy_head.weight,
            policy_head.bias,
            policy_head,
            reference_hidden,
            reference_head,
            targets,
            epsilon,
        )
    )


class _TokenStats(torch.autograd.Function):
    """Forward walks the chunks once; backward forms the policy's logits again."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, head, reference_hidden, reference_head, y, epsilon
    ):
        rows = []
        with _full_precision(hidden, weight):
            for c in _chunks(y.shape[0], weight.shape[0]):
                logits = _logits(hidden[c], head)  # (chunk, vocab)
                reference = _logits(reference_hidden[c], reference_head)
                rows.append(_row_stats(logits, reference, y[c], epsilon))
        fields = len(TokenStats._fields)
        out = torch.cat(rows, dim=1) if rows else hidden.new_zeros(fields, 0).float()
        lse = out[fields] if rows else out.new_zeros(0)
        ctx.save_for_backward(hidden, weight, bias, y, lse)
        ctx.head = head
        stats = tuple(out[i] for i in range(fields))
        ctx.mark_non_differentiable(*stats[1:])
        return stats

    @staticmethod
    def backward(ctx, grad_logp, *_):
        hidden, weight, bias, y, lse = ctx.saved_tensors
        head = Head(weight, bias, ctx.head.scale, ctx.head.cap)
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        d_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        )
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        with _full_precision(hidden, weight):
            for c in _chunks(y.shape[0], weight.shape[0]):
                logits = _logits(hidden[c], head)
                g = _logits_grad(logits, y[c], lse[c], grad_logp[c], head)
                if d_hidden is not None:
                    d_hidden[c] = _times_weight(g, weight).to(d_hidden.dtype)
                if d_weight is not None:  # (vocab, chunk) @ (chunk, hidden)
                    d_weight.addmm_(g.T, hidden[c].float())
                if d_bias is not None:
                    d_bias += g.sum(dim=0)
        cast = [
            None if grad is None else grad.to(like.dtype)
            for grad, like in ((d_weight, weight), (d_bias, bias))
        ]
        return d_hidden, *cast, None, None, None, None, None


@contextmanager
def _full_precision(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[None]:
    """Products of all the operands' digits, whatever is set around us.

    An autocast would round them to bf16. TF32, which axolotl sets on every GPU that has
    it, keeps all digits of 16-bit operands, and their speed, but rounds float32 ones.
    """
    before = torch.get_float32_matmul_precision()
    rounds = before != "highest" and torch.float32 in (hidden.dtype, weight.dtype)
    # the one setter that keeps torch's older and newer switches in agreement
    if rounds:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            yield
    finally:
        if rounds:
            torch.set_float32_matmul_precision(before)


def _chunks(tokens: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocab)
    return [slice(i, i + size) for i in range(0, tokens, size)]


def _logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Float32 logits (chunk, vocab); the head is cast to float32 by rows."""
    out = hidden.new_empty(len(hidden), len(head.weight), dtype=torch.float32)
    hidden = hidden.float()
    for r in range(0, len(head.weight), CAST_ROWS):
        rows = slice(r, r + CAST_ROWS)
        out[:, rows] = hidden @ head.weight[rows].float().T
    if head.bias is not None:
        out += head.bias.float()
    if head.scale != 1.0:
        out *= head.scale
    if head.cap is not None:
        out = head.cap * torch.tanh(out / head.cap)
    return out


def _times_weight(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(chunk, vocab) @ (vocab, hidden) in float32, the head cast by rows."""
    out = grad.new_zeros(len(grad), weight.shape[1])
    for r in range(0, len(weight), CAST_ROWS):
        rows = slice(r, r + CAST_ROWS)
        out.addmm_(grad[:, rows], weight[rows].float())
    return out


def _row_stats(
    logits: torch.Tensor, reference: torch.Tensor, y: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """TokenStats of a chunk and logsumexp of the policy, shape (9, chunk)."""
    y = y[:, None]
    lse, reference_lse = logits.logsumexp(-1), reference.logsumexp(-1)
    logit_y, reference_y = logits.gather(1, y)[:, 0], reference.gather(1, y)[:, 0]
    hit = logits.argmax(-1) == y[:, 0]
    logp = logits - lse[:, None]
    p = torch.exp(logp)
    d = torch.sub(logits, reference, out=reference)
    d_y = logit_y - reference_y
    return torch.stack(
        [
            logit_y - lse,
            reference_y - reference_lse,
            epsilon * d_y - _log_mean_exp(epsilon, d, p, logits, lse),
            -epsilon * d_y - _log_mean_exp(-epsilon, d, p, logits, lse),
            (p * d).sum(-1) + _log_mean_exp(-1.0, d, p, logits, lse),
            -(p * logp).sum(-1),
            logits.mean(-1),
            hit.float(),
            lse,
        ]
    )


def _log_mean_exp(
    epsilon: float,
    d: torch.Tensor,
    p: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """log Σ_v p_v e^(ε d_v), shape (chunk,), exact for small and for large ε d.

    Small: log1p of the mean of expm1, which keeps every digit of ε d. Where |ε d|
    passes 1, expm1 would overflow in the end, and a difference of two logsumexp has
    digits to spare.
    """
    x = epsilon * d
    small = torch.log1p((p * torch.expm1(x)).sum(-1))
    large = x.abs().amax(-1) > 1
    if not large.any():
        return small
    return torch.where(large, (logits + x).logsumexp(-1) - lse, small)


def _logits_grad(
    logits: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    grad_logp: torch.Tensor,
    head: Head,
) -> torch.Tensor:
    """Gradient of Σ grad_logp · log p[y] for `weight @ hidden + bias`.

    d log p[y] / d logits = onehot(y) - p, then through cap and scale.
    """
    grad = torch.exp(logits - lse[:, None]).mul_(-grad_logp[:, None])
    grad.scatter_add_(1, y[:, None], grad_logp[:, None])
    if head.cap is not None:  # d tanh = 1 - tanh²
        grad *= 1 - (logits / head.cap) ** 2
    return grad * head.scale if head.scale != 1.0 else grad
