"""The functions of tile_torch.py in Triton, for GPUs.

cuBLAS computes the matrix products. A kernel reads their float32 output once per tile.
In `add_tile_kernel` one program keeps the tile's row of one token in registers, and
computes all its sums. In `gradient_tile_kernel` one program writes BLOCK values of one
row.

The results are those of tile_torch.py, except for float32 rounding. The compiler must
not fuse products with sums; only an explicit `fma` does. If the scale of one logit were
fused with the subtraction of the other, equal policies would differ by a rounding
error, and this would decide steps. With TRITON_INTERPRET=1 the kernels run on a CPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import tile_torch
from .lm_head import Head
from .tile_torch import new_sums

__all__ = [
    "CHUNK",
    "MATRICES",
    "TILE",
    "add_tile",
    "gradient_tile",
    "new_sums",
    "new_numerators",
    "rescale",
    "tile_size",
]

# See `tile_torch`. A matrix has 64 MiB: large enough to keep tensor cores busy.
CHUNK, TILE, MATRICES = 4096, 4096, 2
# Values of a row that one program writes.
BLOCK = 1024

TOP = tl.constexpr(tile_torch.TOP)
MASS = tl.constexpr(tile_torch.MASS)
LOGIT = tl.constexpr(tile_torch.LOGIT)
DIFFERENCE = tl.constexpr(tile_torch.DIFFERENCE)
BACK = tl.constexpr(tile_torch.BACK)
PLUS = tl.constexpr(tile_torch.PLUS)
MINUS = tl.constexpr(tile_torch.MINUS)
SQUARES = tl.constexpr(tile_torch.SQUARES)
TOTAL = tl.constexpr(tile_torch.TOTAL)
CENTRE = tl.constexpr(tile_torch.CENTRE)
LOGIT_Y = tl.constexpr(tile_torch.LOGIT_Y)
DIFFERENCE_Y = tl.constexpr(tile_torch.DIFFERENCE_Y)
REFERENCE = tl.constexpr(tile_torch.REFERENCE)
UP = tl.constexpr(tile_torch.UP)
DOWN = tl.constexpr(tile_torch.DOWN)
WIDEST = tl.constexpr(tile_torch.WIDEST)
SMALLEST_MEAN = tl.constexpr(tile_torch.SMALLEST_MEAN)
LARGEST_MEAN = tl.constexpr(tile_torch.LARGEST_MEAN)
# For |x| below it, four terms of the series of e^x - 1 are enough.
SERIES = tl.constexpr(0.06)


def tile_size(tokens: int) -> int:
    """Words of a tile: twice as many for few tokens, so that products stay large."""
    return TILE if 2 * tokens > CHUNK else 2 * TILE


def new_numerators(space: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Space for the numerators of `add_tile`: shape (chunk, tile), of this dtype."""
    return torch.empty_like(space[0], dtype=dtype)


@triton.jit
def _expm1(x):
    """e^x - 1 to float32 precision, also for small x."""
    # Taylor series to x^7: for |x| < 0.4 the next term is at most 4e-8 of the first
    p = tl.fma(x, 1 / 5040, 1 / 720)
    p = tl.fma(p, x, 1 / 120)
    p = tl.fma(p, x, 1 / 24)
    p = tl.fma(p, x, 1 / 6)
    p = tl.fma(p, x, 1 / 2)
    p = tl.fma(p, x, 1.0)
    return tl.where(tl.abs(x) < 0.4, p * x, tl.exp(x) - 1)


@triton.jit
def _scale_and_cap(h, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """`Head.scale_and_cap`: scale, then cap · tanh(h / cap)."""
    if SCALED:
        h = h * scale
    if CAPPED:
        e = _expm1(-2 * tl.abs(h / cap))  # tanh(|x|) = -e / (2 + e)
        h = tl.where(h < 0, e, -e) * cap / (2 + e)
    return h


@triton.jit
def _times_slope(w, h, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """w times `Head.slope`."""
    if SCALED:
        w = w * scale
    if CAPPED:
        w = w * (1 - (h / cap) * (h / cap))
    return w


@triton.jit
def _store(pointers, values, mask):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _log_add(a, b):
    """log(e^a + e^b)."""
    m = tl.maximum(a, b)
    return m + tl.log(tl.exp(a - m) + tl.exp(b - m))


@triton.jit
def _sum_of_powers(w, x, t, widest):
    """Σw(e^tx - 1) over a row."""
    if tl.abs(t) * widest < SERIES:
        a = w * x
        b = a * x
        c = b * x
        odd = t * tl.sum(a, 0) + t * t * t / 6 * tl.sum(c, 0)
        even = t * t / 2 * tl.sum(b, 0) + t * t * t * t / 24 * tl.sum(c * x, 0)
        total = odd + even
    else:
        total = tl.sum(w * _expm1(t * x), 0)
    return total


@triton.jit
def _follow_top(sums, stride, h, d, inside):
    """Computes the new m and c of a token, see `tile_torch`.

    Returns m; c; e^(m_before - m); the rescaled Σ w of the tiles before; and δ.
    """
    top_before = tl.load(sums + TOP * stride)
    centre_before = tl.load(sums + CENTRE * stride)
    highest = tl.max(tl.where(inside, h, float("-inf")), 0)
    centre = tl.max(tl.where(inside & (h == highest), d, float("-inf")), 0)
    centre = tl.where(highest > top_before, centre, centre_before)
    top = tl.maximum(top_before, highest)
    shrink = tl.exp(top_before - top)
    moving = tl.load(sums + MASS * stride) * shrink
    step = tl.where(moving > 0, centre - centre_before, 0.0)
    return top, centre, shrink, moving, step


@triton.jit
def _add_expm1_sum(
    sums, stride, field, lse_field, w, h, x, inside, t, widest, top, centre, mass
):
    """Changes the sum Σw(e^tx - 1) of a token to the new m and c, and adds the row.

    If the mean is inexact, it adds the row to the logsumexp, see
    `tile_torch._keep_logsumexps`. `top`, `centre`, `mass`: m, c and Σ w with this row.
    """
    top_before = tl.load(sums + TOP * stride)
    centre_before = tl.load(sums + CENTRE * stride)
    mass_before = tl.load(sums + MASS * stride)
    before = tl.load(sums + field * stride)
    shrink = tl.exp(top_before - top)
    moving = mass_before * shrink
    step = tl.where(moving > 0, centre - centre_before, 0.0)
    total = before * shrink
    total += _expm1(-t * step) * (total + moving)
    total += _sum_of_powers(w, x, t, widest)
    tl.store(sums + field * stride, total)
    mean = total / mass
    digits = (mean >= SMALLEST_MEAN) & (mean <= LARGEST_MEAN)
    digits = digits & (tl.abs(t) * tl.maximum(widest, tl.abs(step)) <= WIDEST)
    known = tl.load(sums + lse_field * stride)
    if (known == known) | (digits == 0):
        so_far = top_before + tl.log(before + mass_before) + t * centre_before
        known = tl.where(known == known, known, so_far)
        values = tl.where(inside, tl.fma(x, t, h), float("-inf"))
        highest = tl.max(values, 0)
        lse = highest + tl.log(tl.sum(tl.exp(values - highest), 0)) + t * centre
        tl.store(sums + lse_field * stride, _log_add(known, lse))


@triton.jit
def _add_expm1_sums(
    sums, stride, w, h, x, inside, epsilon, top, centre, mass, PERTURBED: tl.constexpr
):
    """Adds a row to BACK and, if `PERTURBED`, to PLUS and MINUS."""
    widest = tl.max(tl.abs(x), 0)
    back = sums, stride, BACK, REFERENCE, w, h, x, inside, -1.0
    _add_expm1_sum(*back, widest, top, centre, mass)
    if PERTURBED:
        plus = sums, stride, PLUS, UP, w, h, x, inside, epsilon
        _add_expm1_sum(*plus, widest, top, centre, mass)
        minus = sums, stride, MINUS, DOWN, w, h, x, inside, -epsilon
        _add_expm1_sum(*minus, widest, top, centre, mass)


@triton.jit
def _store_target(sums, stride, targets, v, h, d, tile):
    """Sets LOGIT_Y and DIFFERENCE_Y, if the target is in the tile."""
    y = tl.load(targets)
    if (y >= 0) & (y < tile):
        tl.store(sums + LOGIT_Y * stride, tl.sum(tl.where(v == y, h, 0.0), 0))
        tl.store(sums + DIFFERENCE_Y * stride, tl.sum(tl.where(v == y, d, 0.0), 0))


@triton.jit
def add_tile_kernel(
    policy,
    reference,
    targets,
    sums,
    numerators,
    shrinks,
    tile,
    stride,
    epsilon,
    scale,
    cap,
    reference_scale,
    reference_cap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    REFERENCE_SCALED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    PERTURBED: tl.constexpr,
    SQUARED: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the row of one token, see `tile_torch.add_tile`; h, d, w, x as there."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * tile
    sums += token
    v = tl.arange(0, BLOCK)
    inside = v < tile
    h = tl.load(policy + row + v, mask=inside, other=0.0)
    r = tl.load(reference + row + v, mask=inside, other=0.0)
    h = _scale_and_cap(h, scale, cap, SCALED, CAPPED)
    r = _scale_and_cap(
        r, reference_scale, reference_cap, REFERENCE_SCALED, REFERENCE_CAPPED
    )
    d = h - r
    tl.store(sums + TOTAL * stride, tl.load(sums + TOTAL * stride) + tl.sum(h, 0))
    top, centre, shrink, moving, step = _follow_top(sums, stride, h, d, inside)
    tl.store(shrinks + token, shrink)
    w = tl.where(inside, tl.exp(h - top), 0.0)
    x = tl.where(inside, d - centre, 0.0)
    if KEEPS:
        kept = _times_slope(w, h, scale, cap, SCALED, CAPPED)
        _store(numerators + row + v, kept, inside)
    logit = tl.load(sums + LOGIT * stride) * shrink + tl.sum(w * h, 0)
    tl.store(sums + LOGIT * stride, logit)
    if SQUARED:
        squares = tl.load(sums + SQUARES * stride) * shrink * shrink
        tl.store(sums + SQUARES * stride, squares + tl.sum(w * w, 0))
    mass = moving + tl.sum(w, 0)
    difference = tl.load(sums + DIFFERENCE * stride) * shrink - step * moving
    tl.store(sums + DIFFERENCE * stride, difference + tl.sum(w * x, 0))
    _add_expm1_sums(
        sums, stride, w, h, x, inside, epsilon, top, centre, mass, PERTURBED
    )
    tl.store(sums + TOP * stride, top)
    tl.store(sums + CENTRE * stride, centre)
    tl.store(sums + MASS * stride, mass)
    _store_target(sums, stride, targets + token, v, h, d, tile)


def add_tile(
    sums: torch.Tensor,
    space: torch.Tensor,
    targets: torch.Tensor,
    heads: Sequence[Head],
    *,
    epsilon: float | None,
    sum_sq_probs: bool,
    numerators: torch.Tensor | None,
) -> torch.Tensor:
    """Adds a tile to the sums, see `tile_torch.add_tile`.

    Here `space` is not changed, and the numerators may have any dtype. If only the
    policy is scored, the kernel compares it with itself: all d are 0.
    """
    policy, reference = space[0], space[-1]
    tokens, tile = policy.shape
    shrinks = torch.empty_like(sums[0])
    block = triton.next_power_of_2(max(tile, TILE))
    add_tile_kernel[(tokens,)](
        policy,
        reference,
        targets,
        sums,
        policy if numerators is None else numerators,
        shrinks,
        tile,
        sums.stride(0),
        epsilon or 0.0,
        *_numbers(heads[0]),
        *_numbers(heads[-1]),
        *_flags(heads[0]),
        *_flags(heads[-1]),
        PERTURBED=epsilon is not None,
        SQUARED=sum_sq_probs,
        KEEPS=numerators is not None,
        BLOCK=block,
        num_warps=warps(block),
        enable_fp_fusion=False,
    )
    return shrinks


def warps(block: int) -> int:
    """Warps of a program: a thread holds 32 logits of the block.

    It uses all registers and spills none. With half as many logits fewer programs run
    side by side, and on an H100 the head takes 13 % more time.
    """
    return block // 1024


def _numbers(head: Head) -> tuple[float, float]:
    """Scale and cap of a head, as arguments of a kernel."""
    return float(head.scale), float(head.cap or 1.0)


def _flags(head: Head) -> tuple[bool, bool]:
    """Whether a head has a scale and a cap: SCALED and CAPPED of a kernel."""
    return head.scale != 1, head.cap is not None


@triton.jit
def gradient_tile_kernel(
    policy,
    targets,
    lse,
    grad_logp,
    out,
    tile,
    scale,
    cap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient by the logits of a token, one block of a tile per program."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * tile
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(policy + row + v, mask=v < tile, other=0.0)
    h = _scale_and_cap(h, scale, cap, SCALED, CAPPED)
    p = tl.exp(h - tl.load(lse + token))
    g = tl.where(v == tl.load(targets + token), 1.0, 0.0) - p
    g = g * tl.load(grad_logp + token)
    _store(out + row + v, _times_slope(g, h, scale, cap, SCALED, CAPPED), v < tile)


def gradient_tile(
    policy: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logp: torch.Tensor,
    head: Head,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient for the logits of a tile, see `tile_torch.gradient_tile`.

    Here `policy` is not changed.
    """
    tokens, tile = policy.shape
    out = torch.empty_like(policy, dtype=dtype)
    gradient_tile_kernel[(tokens, triton.cdiv(tile, BLOCK))](
        policy,
        targets,
        lse,
        grad_logp,
        out,
        tile,
        *_numbers(head),
        *_flags(head),
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def rescale_kernel(values, factors, width, BLOCK: tl.constexpr):
    """Multiplies a row by its factor, one row per program."""
    token = tl.program_id(0)
    factor = tl.load(factors + token)
    if factor != 1:  # after the first tiles, m of most rows stays the same
        for start in range(0, width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            p = values + token.to(tl.int64) * width + i
            tl.store(p, tl.load(p, mask=i < width) * factor, mask=i < width)


def rescale(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies rows in place, see `tile_torch.rescale`; rows must be contiguous."""
    tokens, width = values.shape
    rescale_kernel[(tokens,)](
        values, factor, width, BLOCK=BLOCK, enable_fp_fusion=False
    )
