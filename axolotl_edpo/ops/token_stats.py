"""Everything ε-DPO needs of two logit vectors, position by position, in one op.

With h = h_θ and h_ref the logits of policy and reference at one position, y the token
that follows, d = h - h_ref and p = softmax(h):

    policy_logp     h[y] - logsumexp(h)                                gradient
    reference_logp  policy_logp - d[y] - log Σ_v p_v e^(-d_v)
    plus, minus     ±ε d[y] - log Σ_v p_v e^(±ε d_v)
    kl              Σ_v p_v d_v + log Σ_v p_v e^(-d_v)

`plus` and `minus` are log π_{1±ε}(y) - log π_θ(y) for the perturbed policies
softmax(h_ref + (1±ε) d) of Proposition 1, https://arxiv.org/abs/2502.13177. Only their
signs, summed over a pair, are used, and they are ε times a small number, so they are
never formed as a difference of two log-softmaxes: that loses the sign in bf16 and
often in float32. A log of a mean is log1p of a mean of expm1: d = 0 gives exactly 0.
The same number may be subtracted from every d_v, see tiles.py.

The vocabulary is walked in tiles. `tiles.py`, or `kernels.py` on a GPU, adds each to
running sums per token; this file walks the tiles and finishes the sums. The gradient is

    ∂ policy_logp / ∂ hidden = weight[y] - Σ_v p_v weight[v]

A frozen head has it made in forward from the same tiles, so the whole op costs three
matrix products: policy, reference, gradient. The gradient of a head that trains needs
the loss's first. Where they fit into KEPT_BYTES, the numerators of p are kept until
then: four products. Else backward forms the policy's logits again: five.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import tile_torch as tiles
from .lm_head import (
    Head,
    Rows,
    Tensors,
    add_product,
    as_autocast,
    full_precision,
    product,
    rows_of,
)
from .tile_torch import (
    CENTRE,
    COLLISION,
    LOGIT,
    LOGIT_Y,
    MASS,
    RATIO,
    RATIO_Y,
    TOP,
    TOTAL,
    log_mean,
    moved,
)

Backend = Literal["auto", "eager", "triton"]

# Values of a float32 accumulator of gradients: 2**25 are 128 MiB. More tokens than fit
# are worked through in blocks; a 16-bit weight gradient is rounded once per block.
BLOCK_VALUES = 2**25
# What a head that trains may keep of the vocabulary between forward and backward.
KEPT_BYTES = 2**29


class TokenStats(NamedTuple):
    """Per completion token, each of shape (tokens,) and float32.

    Attributes:
        policy_logp: log π_θ(y), nats, with gradient.
        reference_logp: log π_ref(y), nats.
        plus: log π_{1+ε}(y) - log π_θ(y), nats; 0 without ε.
        minus: log π_{1-ε}(y) - log π_θ(y), nats; 0 without ε.
        kl: KL(π_θ || π_ref) over the vocabulary, nats.
        entropy: of π_θ, nats.
        mean_logit: mean of h over the vocabulary.
        hit: 1 where no token is more likely than y, else 0.
        collision: Σ_v p_v² of π_θ; 0 unless asked for.
    """

    policy_logp: torch.Tensor
    reference_logp: torch.Tensor
    plus: torch.Tensor
    minus: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    mean_logit: torch.Tensor
    hit: torch.Tensor
    collision: torch.Tensor


def token_stats(
    policy_hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    policy_head: Head,
    reference_head: Head,
    targets: torch.Tensor,
    epsilon: float | None,
    *,
    collision: bool = False,
    backend: Backend = "auto",
) -> TokenStats:
    """Scores completion tokens under policy, reference and both perturbed policies.

    Equals, with log_softmax taken of the full logits in exact arithmetic,

        policy_logp = log_softmax(h)[y]
        plus, minus = log_softmax(h_ref + (1 ± ε)(h - h_ref))[y] - policy_logp

    Args:
        policy_hidden: Shape (tokens, hidden); gradient flows to it.
        reference_hidden: Shape (tokens, hidden).
        policy_head: Gradient flows to its tensors where they require it.
        reference_head: Same vocabulary; no gradient.
        targets: Shape (tokens,), int64.
        epsilon: Perturbation, 0 < ε < 1; None leaves `plus` and `minus` at 0.
        collision: Whether `collision` is wanted.
        backend: `auto` is `triton` on CUDA and `eager` elsewhere.

    Returns:
        One value per token for each statistic. Without tokens, empty tensors that
        still carry a (zero) gradient.

    Raises:
        ValueError: If shapes or vocabularies do not fit.
    """
    _check_shapes(policy_hidden, reference_hidden, policy_head, reference_head, targets)
    inputs = policy_head.inputs(as_autocast(policy_hidden))
    with torch.no_grad():
        reference = _Side.of(reference_head, as_autocast(reference_hidden))
    call = _Call(
        policy_head,
        targets,
        epsilon,
        collision,
        _operations(backend, policy_hidden.device),
        with_grad=torch.is_grad_enabled(),
    )
    tensors = (w if isinstance(w, torch.Tensor) else None for w in policy_head.weights)
    return TokenStats(
        *_TokenStats.apply(call, reference, policy_head.bias, *inputs, *tensors)
    )


def logits_stats(
    policy_logits: torch.Tensor,
    reference_logits: torch.Tensor,
    targets: torch.Tensor,
    epsilon: float | None,
    *,
    collision: bool = False,
    backend: Backend = "auto",
) -> TokenStats:
    """As `token_stats`, of logits that a model made itself.

    Args:
        policy_logits: Shape (tokens, vocab); gradient flows to them.
        reference_logits: Shape (tokens, vocab).
        targets: Shape (tokens,), int64.
        epsilon: As in `token_stats`.
        collision: As in `token_stats`.
        backend: As in `token_stats`.

    Returns:
        As `token_stats`.
    """
    policy = _Made(policy_logits.detach())
    call = _Call(
        policy.head,
        targets,
        epsilon,
        collision,
        _operations(backend, targets.device),
        with_grad=False,
    )
    stats, _, _ = _forward(call, policy, _Made(reference_logits), early=False)
    nll = torch.nn.functional.cross_entropy(
        policy_logits.float(), targets, reduction="none"
    )
    # the value that reference_logp was made from, with the gradient of -nll
    return stats._replace(policy_logp=stats.policy_logp + (nll.detach() - nll))


def _check_shapes(policy_hidden, reference_hidden, policy_head, reference_head, y):
    vocab, tokens = policy_head.vocab, len(y)
    if reference_head.vocab != vocab:
        raise ValueError(
            f"policy has a vocabulary of {vocab}, reference of "
            f"{reference_head.vocab}: use a reference with the same head"
        )
    if len(policy_hidden) != tokens or len(reference_hidden) != tokens:
        raise ValueError(
            f"{tokens} targets for {len(policy_hidden)} policy and "
            f"{len(reference_hidden)} reference positions"
        )


def _operations(backend: Backend, device: torch.device) -> ModuleType:
    """`kernels` or `tiles`: the same functions, in Triton and in PyTorch."""
    if backend == "eager" or (backend == "auto" and device.type != "cuda"):
        return tiles
    from . import tile_triton as kernels

    return kernels


@dataclass(frozen=True)
class _Side:
    """Policy or reference: a head and what it is multiplied with."""

    head: Head
    inputs: Tensors
    weights: tuple[torch.Tensor | Rows, ...]
    bias: torch.Tensor | None

    @classmethod
    def of(cls, head: Head, hidden: torch.Tensor) -> "_Side":
        return cls(head, head.inputs(hidden), head.weights, head.bias)

    def rows(self, tile: slice) -> list[torch.Tensor]:
        """The tile of every weight, each of shape (tile, width)."""
        pairs = zip(self.weights, self.inputs, strict=True)
        return [rows_of(weight, tile, x) for weight, x in pairs]

    def logits(
        self, rows: list[torch.Tensor], chunk: slice, tile: slice, out: torch.Tensor
    ) -> None:
        """weight @ hidden + bias, before scale and cap, into out (chunk, tile)."""
        product(self.inputs[0][chunk], rows[0].T, out)
        for x, up in zip(self.inputs[1:], rows[1:], strict=True):  # LoRA
            add_product(x[chunk], up.T, out)
        if self.bias is not None:
            out += self.bias[tile]


@dataclass(frozen=True)
class _Made:
    """Policy or reference whose logits are there: a `_Side` without a product."""

    values: torch.Tensor
    inputs: Tensors = ()
    weights: Tensors = ()

    @property
    def head(self) -> Head:
        """One that leaves the logits alone."""
        return Head(self.values.T)

    def rows(self, tile: slice) -> list[torch.Tensor]:
        return []

    def logits(self, rows, chunk: slice, tile: slice, out: torch.Tensor) -> None:
        out.copy_(self.values[chunk, tile])


@dataclass(frozen=True)
class _Call:
    """What `token_stats` was asked, apart from what may need a gradient."""

    policy: Head
    targets: torch.Tensor
    epsilon: float | None
    collision: bool
    ops: ModuleType
    with_grad: bool

    def blocks(self) -> Iterator[slice]:
        """Tokens whose gradients fit into BLOCK_VALUES."""
        width = sum(weight.shape[1] for weight in self.policy.weights)
        size = max(1, BLOCK_VALUES // max(1, width))
        if size > self.ops.CHUNK:
            size -= size % self.ops.CHUNK
        return _slices(0, len(self.targets), size)

    @property
    def width(self) -> int:
        """Columns of a tile."""
        rows = min(self.ops.CHUNK, max(1, len(self.targets)))
        return min(self.ops.tile_size(rows), self.policy.vocab)

    def tiles(self) -> Iterator[slice]:
        """The vocabulary, tile by tile."""
        return _slices(0, self.policy.vocab, self.width)

    def chunks(self, block: slice) -> Iterator[slice]:
        """The tokens of a block that meet a tile at once."""
        return _slices(block.start, block.stop, self.ops.CHUNK)

    def scratch(self, matrices: int) -> torch.Tensor:
        """Space for float32 matrices of a tile, see `_cut`."""
        rows = min(self.ops.CHUNK, len(self.targets))
        return torch.empty(matrices, rows * self.width, device=self.targets.device)

    def new_weights(self, space: torch.Tensor, rows: list) -> torch.Tensor:
        """Space for w of a tile, which is multiplied with these rows."""
        return self.ops.new_weights(space, rows[0].dtype)

    def add_tile(
        self,
        sums: torch.Tensor,
        space: torch.Tensor,
        c: slice,
        tile: slice,
        reference: Head,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """`tiles.add_tile` of these tokens and this tile."""
        return self.ops.add_tile(
            sums,
            space,
            self.targets[c] - tile.start,
            (self.policy, reference),
            epsilon=self.epsilon,
            collision=self.collision,
            out=out,
        )

    @contextmanager
    def on_device(self, *sides: _Side | _Made) -> Iterator[None]:
        """Within it, kernels run where the tensors are, and products keep all digits.

        Args:
            *sides: What is multiplied.
        """
        operands = [x for side in sides for x in (*side.inputs, *side.weights)]
        device = torch.cuda.device_of(self.targets)
        with device, full_precision(self.targets, *operands):
            yield


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _cut(scratch: torch.Tensor, chunk: slice, tile: slice) -> torch.Tensor:
    """The scratch as contiguous matrices of shape (chunk, tile)."""
    rows, columns = chunk.stop - chunk.start, tile.stop - tile.start
    return scratch[:, : rows * columns].view(-1, rows, columns)


# The smallest factor of `_Kept`: e^-69, far from the end of bfloat16's range.
LEAST_FACTOR = 1e-30


@dataclass(frozen=True)
class _Kept:
    """onehot(y) - p in two factors, for the gradient of a head that trains.

    Attributes:
        values: w of `add_tile`, tile after tile, each of shape (tokens, tile); once
            `finish` was called, with another value at y.
        factors: The m of each tile that its w is relative to, shape (tiles, tokens);
            then -e^(m - logsumexp).
    """

    values: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def fitting(cls, call: _Call, policy: _Side) -> "_Kept | None":
        """Space for it, if there is enough: float16 has too small a range.

        Args:
            call: Whose vocabulary and tokens there are.
            policy: Whose numerators are kept.
        """
        tokens, tiles = len(call.targets), len([*call.tiles()])
        rows = rows_of(policy.weights[0], slice(0, 1), policy.inputs[0])
        fits = tokens * call.policy.vocab * rows.itemsize <= KEPT_BYTES
        if not fits or rows.dtype == torch.float16:
            return None
        values = rows.new_empty(tokens * call.policy.vocab)
        return cls(values, torch.empty(tiles, tokens, device=rows.device))

    def of(self, tile: slice) -> torch.Tensor:
        """Those of a tile, shape (tokens, tile)."""
        tokens = self.factors.shape[1]
        part = self.values[tokens * tile.start : tokens * tile.stop]
        return part.view(tokens, tile.stop - tile.start)

    def finish(
        self, call: _Call, lse: torch.Tensor, logp: torch.Tensor, logit_y: torch.Tensor
    ) -> None:
        """Makes factors of what was kept.

        Args:
            call: Whose targets they are.
            lse: logsumexp of the logits, as all that follow of shape (tokens,).
            logp: log p[y].
            logit_y: h[y].
        """
        factors = torch.exp(self.factors - lse).clamp_(min=LEAST_FACTOR).neg_()
        self.factors.copy_(factors)
        number = call.targets // call.width
        start = number * call.width
        columns = (call.policy.vocab - start).clamp(max=call.width)
        tokens = torch.arange(len(lse), device=lse.device)
        where = len(lse) * start + tokens * columns + call.targets - start
        at_y = -torch.expm1(logp) * call.policy.slope(logit_y)  # (1 - p[y]) slope
        at_y = at_y / factors.gather(0, number[None])[0]
        self.values.scatter_(0, where, at_y.to(self.values.dtype))

    def gradients(
        self,
        call: _Call,
        grad_logp: torch.Tensor,
        inputs: Tensors,
        out: list[torch.Tensor | None],
    ) -> None:
        """Fills the gradients of weights, given what each is multiplied with.

        ∂ policy_logp / ∂ weight = (onehot(y) - p)ᵀ inputs
        """
        wanted = [
            (whole, x, torch.empty_like(x, dtype=self.values.dtype))
            for whole, x in zip(out, inputs, strict=True)
            if whole is not None
        ]
        for tile, factor in zip(call.tiles(), self.factors, strict=True):
            scale = (grad_logp * factor)[:, None]
            for whole, x, scaled in wanted:
                torch.mul(x, scale, out=scaled)
                _write_product(self.of(tile).T, scaled, whole[tile])


def _write_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, rounded once."""
    wide = out.dtype == torch.float32
    exact = out if wide else torch.empty_like(out, dtype=torch.float32)
    product(a, b, exact)
    out.copy_(exact)


class _TokenStats(torch.autograd.Function):
    """Forward reads every tile once; backward once more at most, see `_Kept`."""

    @staticmethod
    def forward(ctx, call, reference, bias, *tensors):
        half = len(tensors) // 2
        inputs, weights = tensors[:half], tensors[half:]
        policy = _Side(call.policy, inputs, call.policy.weights, bias)
        wants_bias, *wants = ctx.needs_input_grad[2:]
        wanted = zip((bias, *weights), (wants_bias, *wants[half:]), strict=True)
        head = [x if want else None for x, want in wanted]
        trained, kept = any(x is not None for x in head), None
        if call.with_grad and trained:
            kept = _Kept.fitting(call, policy)
        early = call.with_grad and (kept is not None or not trained and any(wants))
        stats, lse, gradients = _forward(call, policy, reference, early, kept)
        ctx.call, ctx.half, ctx.early = call if trained else None, half, early
        ctx.head = [x if x is None else (x.shape, x.dtype) for x in head]
        if not early:
            ctx.save_for_backward(lse, bias, *tensors)
        elif kept is None:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(*gradients, *inputs, kept.values, kept.factors)
        ctx.mark_non_differentiable(*stats[1:])
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, *_):
        grad_logp = grad_logp.contiguous()  # that of a sum is one value, expanded
        half, call = ctx.half, ctx.call
        if not ctx.early:
            return None, None, *_read_again(ctx, grad_logp)
        # float32 inside: a rounded factor would bend a whole sequence alike
        d_inputs = [
            torch.mul(g, grad_logp[:, None], out=torch.empty_like(g))
            for g in ctx.saved_tensors[:half]
        ]
        if call is None:
            return None, None, None, *d_inputs, *(None for _ in d_inputs)
        *inputs, values, factors = ctx.saved_tensors[half:]
        d_bias, *d_weights = d_head = [
            None if x is None else values.new_empty(x[0], dtype=x[1]) for x in ctx.head
        ]
        ones = values.new_ones(len(grad_logp), 1)  # what a bias is multiplied with
        columns = [None if d is None else d.view(len(d), -1) for d in d_head]
        with torch.cuda.device_of(grad_logp), full_precision(values, *inputs):
            _Kept(values, factors).gradients(call, grad_logp, (ones, *inputs), columns)
        return None, None, d_bias, *d_inputs, *d_weights


def _forward(
    call: _Call,
    policy: _Side | _Made,
    reference: _Side | _Made,
    early: bool,
    kept: _Kept | None = None,
) -> tuple[TokenStats, torch.Tensor, list[torch.Tensor]]:
    """Statistics, the policy's logsumexp and, if early, ∂ policy_logp / ∂ inputs."""
    with call.on_device(policy, reference):
        sums, gradients = _read_tiles(call, policy, reference, early, kept)
        stats, lse = _finish(call, sums)
    if kept is not None:
        kept.finish(call, lse, stats.policy_logp, sums[LOGIT_Y])
    return stats, lse, gradients


def _read_tiles(
    call: _Call,
    policy: _Side | _Made,
    reference: _Side | _Made,
    early: bool,
    kept: _Kept | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sums over the vocabulary; if early, also ∂ policy_logp / ∂ inputs."""
    sums = call.ops.new_sums(len(call.targets), call.targets.device)
    gradients = [torch.empty_like(x) for x in policy.inputs] if early else []
    scratch = call.scratch(call.ops.MATRICES)
    for block in call.blocks():
        means = _Parts(gradients, block)  # Σ w · weight
        for number, tile in enumerate(call.tiles()):
            rows, reference_rows = policy.rows(tile), reference.rows(tile)
            for c in call.chunks(block):
                space, w = _cut(scratch, c, tile), None
                policy.logits(rows, c, tile, space[0])
                reference.logits(reference_rows, c, tile, space[1])
                if early:
                    w = kept.of(tile)[c] if kept else call.new_weights(space, rows)
                shrink = call.add_tile(sums[:, c], space, c, tile, reference.head, w)
                if kept is not None:
                    kept.factors[number, c] = sums[TOP, c]
                for mean in means.at(c):
                    call.ops.rescale(mean, shrink)
                means.add_products(c, w, rows if early else [])
        for c in call.chunks(block):
            _fill_gradients(policy, call.targets, sums, c, means.at(c), gradients)
    return sums, gradients


def _fill_gradients(policy, targets, sums, c: slice, means, gradients) -> None:
    """gradients[c] = weight[y] · slope - Σ p · weight."""
    slope = policy.head.slope(sums[LOGIT_Y, c, None])
    for i, mean in enumerate(means):
        mean /= -sums[MASS, c, None]
        rows = rows_of(policy.weights[i], targets[c], policy.inputs[i])
        gradients[i][c] = mean.add_(rows.float() * slope)


class _Parts:
    """Float32 accumulators for some rows of those gradients that are wanted."""

    def __init__(self, wholes: Sequence[torch.Tensor | None], rows: slice):
        self._wholes, self._rows = wholes, rows
        self._parts = [
            None if g is None else torch.zeros(g[rows].shape, device=g.device)
            for g in wholes
        ]

    def at(self, rows: slice) -> Iterator[torch.Tensor]:
        """The accumulators at rows of the whole."""
        start = self._rows.start
        within = slice(rows.start - start, rows.stop - start)
        return (part[within] for part in self._parts if part is not None)

    def add_products(self, rows: slice, left: Any, rights: Sequence) -> None:
        """parts[rows] += left @ right, for the rights whose gradient is wanted."""
        wanted = (r for r, g in zip(rights, self._wholes, strict=True) if g is not None)
        for part, right in zip(self.at(rows), wanted, strict=True):
            add_product(left, right, part)

    def flush(self) -> None:
        """Adds them to the gradients."""
        for whole, part in zip(self._wholes, self._parts, strict=True):
            if whole is not None and part is not None:
                whole[self._rows] += part


def _finish(call: _Call, sums: torch.Tensor) -> tuple[TokenStats, torch.Tensor]:
    """The formulas of the module's docstring, and the policy's logsumexp."""
    mass, logit_y, d_y = sums[MASS], sums[LOGIT_Y], sums[RATIO_Y]
    x_y = d_y - sums[CENTRE]
    lse = sums[TOP] + mass.log()
    logp = logit_y - lse
    shift, plus, minus = (log_mean(sums, *row) for row in moved(call.epsilon))
    epsilon = call.epsilon or 0.0
    stats = TokenStats(
        policy_logp=logp,
        reference_logp=logp - (x_y + shift),
        plus=epsilon * x_y - plus,
        minus=-epsilon * x_y - minus,
        kl=sums[RATIO] / mass + shift,
        entropy=lse - sums[LOGIT] / mass,
        mean_logit=sums[TOTAL] / call.policy.vocab,
        hit=(logit_y >= sums[TOP]).float(),
        collision=sums[COLLISION] / mass**2,
    )
    return stats, lse


def _read_again(ctx, grad_logp: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of bias, inputs and weights, from logits formed again."""
    call, half, wanted = ctx.call, ctx.half, ctx.needs_input_grad[2:]
    lse, bias, *tensors = ctx.saved_tensors
    weights = tuple(
        weight if saved is None else saved
        for weight, saved in zip(call.policy.weights, tensors[half:], strict=True)
    )
    policy = _Side(call.policy, tuple(tensors[:half]), weights, bias)
    operands = (bias, *policy.inputs, *weights)
    out = [
        torch.zeros_like(x) if want else None
        for x, want in zip(operands, wanted, strict=True)
    ]
    with call.on_device(policy):
        _add_gradients(call, policy, lse, grad_logp, out)
    return out


def _add_gradients(
    call: _Call,
    policy: _Side,
    lse: torch.Tensor,
    grad_logp: torch.Tensor,
    out: list[torch.Tensor | None],
) -> None:
    """Adds to the gradients of bias, inputs and weights, tile by tile."""
    half = len(policy.inputs)
    bias, hidden, trained = out[0], out[1 : 1 + half], out[1 + half :]
    scratch = call.scratch(1)
    for block in call.blocks():
        d_inputs = _Parts(hidden, block)
        for tile in call.tiles():
            rows, d_rows = policy.rows(tile), _Parts(trained, tile)
            d_bias = _Parts([bias], tile)
            for c in call.chunks(block):
                (h,) = _cut(scratch, c, tile)
                policy.logits(rows, c, tile, h)
                g = call.ops.gradient_tile(
                    h,
                    call.targets[c] - tile.start,
                    lse[c],
                    grad_logp[c],
                    policy.head,
                    rows[0].dtype,
                )
                # (chunk, tile) @ (tile, width) and (tile, chunk) @ (chunk, width)
                d_inputs.add_products(c, g, rows)
                d_rows.add_products(tile, g.T, [x[c] for x in policy.inputs])
                for part in d_bias.at(tile):
                    part += g.sum(0, dtype=torch.float32)
            d_rows.flush()
            d_bias.flush()
        d_inputs.flush()
