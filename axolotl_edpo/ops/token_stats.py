"""The op: everything ε-DPO needs of the logits of policy and reference, per token.

At one position, h and h_ref are the logits of policy and reference, and y is the next
token. With d = h - h_ref and p = softmax(h):

    policy_logp     h[y] - logsumexp(h)                                gradient
    reference_logp  policy_logp - d[y] - log Σ_v p_v e^(-d_v)
    plus, minus     ±ε d[y] - log Σ_v p_v e^(±ε d_v)
    kl              Σ_v p_v d_v + log Σ_v p_v e^(-d_v)

`plus` and `minus` are log π_{1±ε}(y) - log π_θ(y) for the perturbed policies
softmax(h_ref + (1±ε) d) of Proposition 1, https://arxiv.org/abs/2502.13177. A step
depends only on the signs of their sums over a pair, and they are small. The difference
of two log-softmaxes would lose the sign in bf16, and often in float32. So the log of a
mean is computed as log1p of a mean of expm1. This gives exactly 0 if d = 0.

The full logits are never in memory. walk.py computes them for a chunk of tokens and a
tile of words at a time. tile_torch.py, or tile_triton.py on a GPU, adds each such
matrix to sums per token. This file turns the sums into the statistics. The gradient is

    ∂ policy_logp / ∂ hidden = weight[y] - Σ_v p_v weight[v]

If the head is frozen, forward computes it from the same matrices. The op then has three
matrix products: policy, reference, gradient. If the head trains, its gradient can only
be computed in backward. If the probabilities are few enough, they are kept until then
(kept_probs.py): four products. Else backward computes the policy's logits a second
time: five products. Without a reference there is one product less.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import tile_torch
from .gradients import InputGradients, add_gradients, scale_rows
from .kept_probs import KeptProbs
from .lm_head import Head, as_autocast
from .operands import HeadLogits, Logits, Operands, ReadyLogits
from .tile_torch import (
    CENTRE,
    DIFFERENCE,
    DIFFERENCE_Y,
    LOGIT,
    LOGIT_Y,
    MASS,
    SQUARES,
    TOP,
    TOTAL,
    expm1_sums,
    log_mean,
)
from .walk import Call, Cell, walk

Backend = Literal["auto", "eager", "triton"]


class TokenStats(NamedTuple):
    """The statistics of completion tokens. Each has shape (tokens,) and is float32.

    Attributes:
        policy_logp: log π_θ(y), nats, with gradient.
        reference_logp: log π_ref(y), nats; NaN without a reference.
        plus: log π_{1+ε}(y) - log π_θ(y), nats; 0 without ε.
        minus: log π_{1-ε}(y) - log π_θ(y), nats; 0 without ε.
        kl: KL(π_θ || π_ref) over the vocabulary, nats; NaN without a reference.
        entropy: Entropy of π_θ, nats.
        mean_logit: Mean of h over the vocabulary.
        is_top1: 1 where no token is more likely than y under π_θ, else 0.
        sum_sq_probs: Σ_v p_v² of π_θ; 0 if not wanted.
    """

    policy_logp: torch.Tensor
    reference_logp: torch.Tensor
    plus: torch.Tensor
    minus: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    mean_logit: torch.Tensor
    is_top1: torch.Tensor
    sum_sq_probs: torch.Tensor


def token_stats(
    policy_hidden: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    policy_head: Head,
    reference_head: Head | None,
    targets: torch.Tensor,
    epsilon: float | None,
    *,
    sum_sq_probs: bool = False,
    backend: Backend = "auto",
) -> TokenStats:
    """Scores completion tokens under policy, reference and both perturbed policies.

    In exact arithmetic this would be

        policy_logp = log_softmax(h)[y]
        plus, minus = log_softmax(h_ref + (1 ± ε)(h - h_ref))[y] - policy_logp

    Args:
        policy_hidden: Shape (tokens, hidden); gradient flows to it.
        reference_hidden: Shape (tokens, hidden); None: only the policy is scored.
        policy_head: Gradient flows to those of its tensors that require it.
        reference_head: Has the same vocabulary; no gradient. None without a reference.
        targets: Shape (tokens,), int64.
        epsilon: Perturbation, 0 < ε < 1; None leaves `plus` and `minus` at 0.
        sum_sq_probs: Whether to compute the statistic `sum_sq_probs`.
        backend: `auto` is `triton` on CUDA and `eager` elsewhere.

    Returns:
        One value per token for each statistic. Without tokens the tensors are empty,
        and their gradients are 0.

    Raises:
        ValueError: If the numbers of tokens or the vocabularies differ.
    """
    policy = HeadLogits.from_hidden(policy_head, as_autocast(policy_hidden))
    reference = None
    if reference_hidden is not None and reference_head is not None:
        with torch.no_grad():
            states = as_autocast(reference_hidden)
            reference = HeadLogits.from_hidden(reference_head, states)
    _check_shapes(policy, reference, targets)
    call = Call(
        targets,
        policy_head.vocab,
        sum(weight.shape[1] for weight in policy_head.weights),
        epsilon,
        sum_sq_probs,
        _tile_ops(backend, policy_hidden.device),
        with_grad=torch.is_grad_enabled(),
    )
    # each factor is an argument, so that autograd sees it; it ignores quantized weights
    stats = _TokenStatsOfHead.apply(call, policy_head, reference, *policy.operands.flat)
    return TokenStats(*stats)


def logits_stats(
    policy_logits: torch.Tensor,
    reference_logits: torch.Tensor | None,
    targets: torch.Tensor,
    epsilon: float | None,
    *,
    sum_sq_probs: bool = False,
    backend: Backend = "auto",
) -> TokenStats:
    """The statistics of `token_stats`, from logits that a model has computed.

    Args:
        policy_logits: Shape (tokens, vocab); gradient flows to them.
        reference_logits: Shape (tokens, vocab); None: only the policy is scored.
        targets: Shape (tokens,), int64.
        epsilon: Perturbation, 0 < ε < 1; None leaves `plus` and `minus` at 0.
        sum_sq_probs: Whether `sum_sq_probs` is wanted.
        backend: `auto` is `triton` on CUDA and `eager` elsewhere.

    Returns:
        One value per token for each statistic.
    """
    call = Call(
        targets,
        policy_logits.shape[1],
        0,
        epsilon,
        sum_sq_probs,
        _tile_ops(backend, targets.device),
        with_grad=False,
    )
    reference = None if reference_logits is None else ReadyLogits(reference_logits)
    stats, _ = _score(call, ReadyLogits(policy_logits.detach()), reference)
    nll = torch.nn.functional.cross_entropy(
        policy_logits.float(), targets, reduction="none"
    )
    # the value of `_score`, which reference_logp is relative to; the gradient of -nll
    return stats._replace(policy_logp=stats.policy_logp + (nll.detach() - nll))


def _check_shapes(policy: HeadLogits, reference: HeadLogits | None, y) -> None:
    given = {"policy": policy}
    if reference is not None:
        given["reference"] = reference
        if reference.head.vocab != policy.head.vocab:
            raise ValueError(
                f"policy has a vocabulary of {policy.head.vocab}, reference of "
                f"{reference.head.vocab}: use a reference with the same head"
            )
    positions = {name: len(logits.operands.hidden) for name, logits in given.items()}
    if any(count != len(y) for count in positions.values()):
        found = " and ".join(f"{count} {name}" for name, count in positions.items())
        raise ValueError(f"{len(y)} targets for {found} positions")


def _tile_ops(backend: Backend, device: torch.device) -> ModuleType:
    """`tile_triton` or `tile_torch`: the same functions in Triton and in PyTorch."""
    if backend == "eager" or (backend == "auto" and device.type != "cuda"):
        return tile_torch
    from . import tile_triton  # Triton is there on Linux only

    return tile_triton


class _TokenStatsOfHead(torch.autograd.Function):
    """`token_stats` for autograd. Backward is one of three functions:

    `_scale_gradients`      the head is frozen: forward computed the gradients
    `_multiply_kept_probs`  the head trains, and forward kept the probabilities
    `_form_logits_again`    the head trains, and the probabilities were too many to keep
    """

    @staticmethod
    def forward(ctx, call: Call, head: Head, reference: HeadLogits | None, *factors):
        """The statistics, and what the way of backward needs."""
        policy = HeadLogits(head, Operands.from_flat(factors))
        wanted = Operands.from_flat(ctx.needs_input_grad[3:])
        kept, gradients = _prepare_gradients(call, policy, wanted)
        stats, lse = _score(call, policy, reference, gradients, kept)
        if gradients is None:
            ctx.way, ctx.call, ctx.head = _form_logits_again, call, head
            tensors = [x if isinstance(x, torch.Tensor) else None for x in factors]
            _save(ctx, lse=[lse], factors=tensors)
        elif kept is None:
            ctx.way = _scale_gradients
            _save(ctx, gradients=gradients.values)
        else:
            ctx.way, ctx.call = _multiply_kept_probs, call
            ctx.dtypes = _dtypes(policy.operands, wanted)
            groups = dict(inputs=policy.inputs, kept=kept.tensors)
            _save(ctx, gradients=gradients.values, **groups)
        ctx.mark_non_differentiable(*stats[1:])
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, *_):
        """The gradients by the operands, from that by `policy_logp`."""
        # the gradient of a sum is an expanded tensor; the kernels need a contiguous one
        gradients = ctx.way(ctx, grad_logp.contiguous())
        return None, None, None, *gradients.flat


def _prepare_gradients(
    call: Call, policy: HeadLogits, wanted: Operands[bool]
) -> tuple[KeptProbs | None, InputGradients | None]:
    """Space for probabilities and for gradients, if forward is to fill them."""
    if not call.with_grad:
        return None, None
    kept = None
    if head_trains := any(wanted.of_head):
        kept = KeptProbs.if_they_fit(call, policy)
    in_forward = kept is not None if head_trains else any(wanted.inputs)
    return kept, InputGradients(call, policy) if in_forward else None


def _dtypes(
    operands: Operands[Any], wanted: Operands[bool]
) -> Operands[torch.dtype | None]:
    """The dtype of every operand whose gradient is wanted."""
    pairs = zip(operands.flat, wanted.flat, strict=True)
    return Operands.from_flat([x.dtype if want else None for x, want in pairs])


def _save(ctx, **groups: Sequence[torch.Tensor | None]) -> None:
    """Saves groups of tensors for backward, by name."""
    ctx.sizes = {name: len(group) for name, group in groups.items()}
    ctx.save_for_backward(*chain(*groups.values()))


def _saved(ctx) -> dict[str, list[Any]]:
    """The groups of tensors that `_save` saved, by name."""
    tensors = iter(ctx.saved_tensors)
    return {name: [*islice(tensors, size)] for name, size in ctx.sizes.items()}


# --- forward ---------------------------------------------------------------------


def _score(
    call: Call,
    policy: Logits,
    reference: Logits | None,
    gradients: InputGradients | None = None,
    kept: KeptProbs | None = None,
) -> tuple[TokenStats, torch.Tensor]:
    """Computes the statistics, in one walk over the vocabulary.

    Args:
        call: Tokens, vocabulary and settings.
        policy: The logits of the policy.
        reference: The logits of the reference; None: only the policy is scored.
        gradients: Space for the gradients of the policy's inputs, or None.
        kept: Space for the policy's probabilities, or None.

    Returns:
        The statistics, and the policy's logsumexp, shape (tokens,).
    """
    compared = [policy] if reference is None else [policy, reference]
    heads = [logits.head for logits in compared]
    matrices = call.tile_ops.MATRICES - (reference is None)
    with call.on_device(*chain(*(logits.factors for logits in compared))):
        sums = call.tile_ops.new_sums(len(call.targets), call.targets.device)
        for cell in walk(call, compared, matrices):
            _add_cell(call, cell, heads, sums, gradients, kept)
        stats, lse = _stats_of_sums(call, sums)
    if reference is None:
        unknown = torch.full_like(lse, torch.nan)
        stats = stats._replace(reference_logp=unknown, kl=unknown.clone())
    if kept is not None:
        kept.finish(call, lse, stats.policy_logp, policy.head.slope(sums[LOGIT_Y]))
    return stats, lse


def _add_cell(
    call: Call,
    cell: Cell,
    heads: Sequence[Head],
    sums: torch.Tensor,
    gradients: InputGradients | None,
    kept: KeptProbs | None,
) -> None:
    """Adds a cell to the sums, and to `gradients` and `kept` if they are given."""
    if gradients is None:
        call.add_tile(sums, cell, heads, None)
        return
    if kept is None:
        w = call.tile_ops.new_numerators(cell.space, cell.weights[0].dtype)
    else:
        w = kept.at(cell.tile)[cell.chunk]
    shrink = call.add_tile(sums, cell, heads, w)
    if kept is not None:
        kept.factors[call.index_of(cell.tile), cell.chunk] = sums[TOP, cell.chunk]
    gradients.add(cell, w, shrink)
    if cell.is_last_tile:
        gradients.finish(cell.chunk, sums)


def _stats_of_sums(call: Call, sums: torch.Tensor) -> tuple[TokenStats, torch.Tensor]:
    """The statistics from the sums, and the policy's logsumexp, shape (tokens,)."""
    mass, logit_y = sums[MASS], sums[LOGIT_Y]
    x_y = sums[DIFFERENCE_Y] - sums[CENTRE]
    lse = sums[TOP] + mass.log()
    logp = logit_y - lse
    to_reference, plus, minus = (
        log_mean(sums, *row) for row in expm1_sums(call.epsilon)
    )
    epsilon = call.epsilon or 0.0
    stats = TokenStats(
        policy_logp=logp,
        reference_logp=logp - (x_y + to_reference),
        plus=epsilon * x_y - plus,
        minus=-epsilon * x_y - minus,
        kl=sums[DIFFERENCE] / mass + to_reference,
        entropy=lse - sums[LOGIT] / mass,
        mean_logit=sums[TOTAL] / call.vocab,
        is_top1=(logit_y >= sums[TOP]).float(),
        sum_sq_probs=sums[SQUARES] / mass**2,
    )
    return stats, lse


# --- backward --------------------------------------------------------------------


def _scale_gradients(ctx, grad_logp: torch.Tensor) -> Operands[Any]:
    """Multiplies the gradients that forward computed with the gradient of the loss."""
    d_inputs = scale_rows(_saved(ctx)["gradients"], grad_logp)
    return Operands.from_parts(d_inputs, [None for _ in d_inputs], None)


def _multiply_kept_probs(ctx, grad_logp: torch.Tensor) -> Operands[Any]:
    """Scales the gradients of the inputs; computes those of bias and weights."""
    call, dtypes, saved = ctx.call, ctx.dtypes, _saved(ctx)
    d_inputs = scale_rows(saved["gradients"], grad_logp)
    kept, inputs = KeptProbs(*saved["kept"]), saved["inputs"]
    new_empty = kept.numerators.new_empty
    d_bias, d_weights, pairs = None, [], []
    for x, dtype in zip(inputs, dtypes.weights, strict=True):
        d_weights.append(dtype and new_empty(call.vocab, x.shape[1], dtype=dtype))
        pairs.append((d_weights[-1], x))
    if dtypes.bias is not None:  # the input of a bias is 1
        d_bias = new_empty(call.vocab, dtype=dtypes.bias)
        pairs.append((d_bias[:, None], kept.numerators.new_ones(len(grad_logp), 1)))
    wanted = [(gradient, x) for gradient, x in pairs if gradient is not None]
    with call.on_device(kept.numerators, *inputs):
        kept.write_gradients(call, grad_logp, wanted)
    return Operands.from_parts(d_inputs, d_weights, d_bias)


def _form_logits_again(ctx, grad_logp: torch.Tensor) -> Operands[Any]:
    """Computes the policy's logits a second time, and from them every gradient."""
    call, head, saved = ctx.call, ctx.head, _saved(ctx)
    operands = Operands.from_flat(saved["factors"])
    if operands.weight is None:  # quantized
        operands = replace(operands, weight=head.weight)
    wanted = ctx.needs_input_grad[3:]
    gradients = Operands.from_flat(
        torch.zeros_like(x) if want else None
        for x, want in zip(operands.flat, wanted, strict=True)
    )
    policy, (lse,) = HeadLogits(head, operands), saved["lse"]
    with call.on_device(*policy.factors):
        add_gradients(call, policy, lse, grad_logp, gradients)
    return gradients
