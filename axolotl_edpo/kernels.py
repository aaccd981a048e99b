"""The functions of tiles.py in Triton, for logits that live on a GPU.

The products stay with cuBLAS, whose float32 output is read here once, one tile of it at
a time. One program walks one token's row of the tile twice, for its maximum and for its
sums, or writes a piece of one row of a gradient.

Numbers are those of tiles.py up to float32 rounding. Products and sums are fused only
where `fma` says so: if the compiler fused the scale of one logit with the difference of
two, equal policies would differ by a rounding, and that decides steps. Under
TRITON_INTERPRET=1 the kernels run on a CPU.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .head import Head
from .tiles import new_sums

__all__ = [
    "CHUNK",
    "MATRICES",
    "TILE",
    "add_tile",
    "gradient_tile",
    "new_sums",
    "rescale",
]

# As in tiles.py: 64 MiB per matrix, products large enough for tensor cores.
CHUNK, TILE, MATRICES = 4096, 4096, 2

TOP = tl.constexpr(tiles.TOP)
MASS = tl.constexpr(tiles.MASS)
LOGIT = tl.constexpr(tiles.LOGIT)
RATIO = tl.constexpr(tiles.RATIO)
BACK = tl.constexpr(tiles.BACK)
PLUS = tl.constexpr(tiles.PLUS)
MINUS = tl.constexpr(tiles.MINUS)
COLLISION = tl.constexpr(tiles.COLLISION)
TOTAL = tl.constexpr(tiles.TOTAL)
WIDEST = tl.constexpr(tiles.WIDEST)
LOGIT_Y = tl.constexpr(tiles.LOGIT_Y)
RATIO_Y = tl.constexpr(tiles.RATIO_Y)
BLOCK = 1024


@triton.jit
def _expm1(x):
    """e^x - 1 to float32 precision, also for small x."""
    # Taylor to x^7; at |x| < 0.4 the next term is 4e-8 of the first
    p = tl.fma(x, 1 / 5040, 1 / 720)
    p = tl.fma(p, x, 1 / 120)
    p = tl.fma(p, x, 1 / 24)
    p = tl.fma(p, x, 1 / 6)
    p = tl.fma(p, x, 1 / 2)
    p = tl.fma(p, x, 1.0)
    return tl.where(tl.abs(x) < 0.4, p * x, tl.exp(x) - 1)


@triton.jit
def _after(h, scale, cap, CAPPED: tl.constexpr):
    """`Head.after`: scale, then cap · tanh(h / cap)."""
    h = h * scale
    if CAPPED:
        e = _expm1(-2 * tl.abs(h / cap))  # tanh(|x|) = -e / (2 + e)
        h = tl.where(h < 0, e, -e) * cap / (2 + e)
    return h


@triton.jit
def _slope(h, scale, cap, CAPPED: tl.constexpr):
    """`Head.slope`."""
    if CAPPED:
        slope = scale * (1 - (h / cap) * (h / cap))
    else:
        slope = scale
    return slope


@triton.jit
def _rescaled(sums, stride, field, factor, value):
    """sums[field] = sums[field] * factor + value."""
    p = sums + field * stride
    tl.store(p, tl.load(p) * factor + value)


@triton.jit
def _store(pointers, values, mask):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _highest(row, tile, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit of a row of the tile."""
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, tile, BLOCK):
        v = start + tl.arange(0, BLOCK)
        h = _after(tl.load(row + v, mask=v < tile, other=0.0), scale, cap, CAPPED)
        highest = tl.maximum(highest, tl.where(v < tile, h, float("-inf")))
    return tl.max(highest, 0)


@triton.jit
def _add_tile_kernel(
    policy,
    reference,
    targets,
    sums,
    weights,
    shrinks,
    tile,
    sums_stride,
    epsilon,
    scale,
    cap,
    reference_scale,
    reference_cap,
    CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    PERTURBED: tl.constexpr,
    COLLIDING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row = token.to(tl.int64) * tile
    sums += token
    top_before = tl.load(sums + TOP * sums_stride)

    top = _highest(policy + row, tile, scale, cap, CAPPED, BLOCK)
    top = tl.maximum(top_before, top)
    shrink = tl.exp(top_before - top)

    zero = tl.zeros((BLOCK,), tl.float32)
    mass, logit, ratio, back = zero, zero, zero, zero
    plus, minus, collision, total, widest = zero, zero, zero, zero, zero
    for start in range(0, tile, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < tile
        h = tl.load(policy + row + v, mask=inside, other=0.0)
        r = tl.load(reference + row + v, mask=inside, other=0.0)
        h = _after(h, scale, cap, CAPPED)
        d = h - _after(r, reference_scale, reference_cap, REFERENCE_CAPPED)
        w = tl.where(inside, tl.exp(h - top), 0.0)
        mass += w
        logit = tl.fma(w, h, logit)
        ratio = tl.fma(w, d, ratio)
        back = tl.fma(w, _expm1(-d), back)
        total += h
        widest = tl.maximum(widest, tl.abs(d))
        if PERTURBED:
            plus = tl.fma(w, _expm1(epsilon * d), plus)
            minus = tl.fma(w, _expm1(-epsilon * d), minus)
        if COLLIDING:
            collision = tl.fma(w, w, collision)
        if WEIGHTED:
            _store(weights + row + v, w * _slope(h, scale, cap, CAPPED), inside)

    tl.store(sums + TOP * sums_stride, top)
    _rescaled(sums, sums_stride, MASS, shrink, tl.sum(mass, 0))
    _rescaled(sums, sums_stride, LOGIT, shrink, tl.sum(logit, 0))
    _rescaled(sums, sums_stride, RATIO, shrink, tl.sum(ratio, 0))
    _rescaled(sums, sums_stride, BACK, shrink, tl.sum(back, 0))
    _rescaled(sums, sums_stride, TOTAL, 1.0, tl.sum(total, 0))
    p = sums + WIDEST * sums_stride
    tl.store(p, tl.maximum(tl.load(p), tl.max(widest, 0)))
    if PERTURBED:
        _rescaled(sums, sums_stride, PLUS, shrink, tl.sum(plus, 0))
        _rescaled(sums, sums_stride, MINUS, shrink, tl.sum(minus, 0))
    if COLLIDING:
        _rescaled(sums, sums_stride, COLLISION, shrink * shrink, tl.sum(collision, 0))
    tl.store(shrinks + token, shrink)

    y = tl.load(targets + token)
    if (y >= 0) & (y < tile):
        h = _after(tl.load(policy + row + y), scale, cap, CAPPED)
        r = tl.load(reference + row + y)
        r = _after(r, reference_scale, reference_cap, REFERENCE_CAPPED)
        tl.store(sums + LOGIT_Y * sums_stride, h)
        tl.store(sums + RATIO_Y * sums_stride, h - r)


def add_tile(
    sums: torch.Tensor,
    space: torch.Tensor,
    targets: torch.Tensor,
    heads: tuple[Head, Head],
    *,
    epsilon: float | None,
    collision: bool,
    weights_as: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tiles.add_tile`; the logits are left as they are."""
    policy, reference = space
    tokens, tile = policy.shape
    weighted = weights_as is not None
    weights = torch.empty_like(policy, dtype=weights_as) if weighted else policy
    shrinks = torch.empty_like(sums[0])
    _add_tile_kernel[(tokens,)](
        policy,
        reference,
        targets,
        sums,
        weights,
        shrinks,
        tile,
        sums.stride(0),
        epsilon or 0.0,
        *_transform(heads[0]),
        *_transform(heads[1]),
        CAPPED=heads[0].cap is not None,
        REFERENCE_CAPPED=heads[1].cap is not None,
        PERTURBED=epsilon is not None,
        COLLIDING=collision,
        WEIGHTED=weighted,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return weights, shrinks


def _transform(head: Head) -> tuple[float, float]:
    return float(head.scale), float(head.cap or 1.0)


@triton.jit
def _gradient_tile_kernel(
    policy,
    targets,
    lse,
    grad_logp,
    out,
    tile,
    scale,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row = token.to(tl.int64) * tile
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(policy + row + v, mask=v < tile, other=0.0)
    h = _after(h, scale, cap, CAPPED)
    p = tl.exp(h - tl.load(lse + token))
    g = tl.where(v == tl.load(targets + token), 1.0, 0.0) - p
    g = g * tl.load(grad_logp + token) * _slope(h, scale, cap, CAPPED)
    _store(out + row + v, g, v < tile)


def gradient_tile(
    policy: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logp: torch.Tensor,
    head: Head,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `tiles.gradient_tile`; the logits are left as they are."""
    tokens, tile = policy.shape
    out = torch.empty_like(policy, dtype=dtype)
    _gradient_tile_kernel[(tokens, triton.cdiv(tile, BLOCK))](
        policy,
        targets,
        lse,
        grad_logp,
        out,
        tile,
        *_transform(head),
        CAPPED=head.cap is not None,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _rescale_kernel(values, factors, width, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    factor = tl.load(factors + token)
    if factor != 1:  # the maximum of most rows stays after the first tiles
        for start in range(0, width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            p = values + token.to(tl.int64) * width + i
            tl.store(p, tl.load(p, mask=i < width) * factor, mask=i < width)


def rescale(values: torch.Tensor, factor: torch.Tensor) -> None:
    """As `tiles.rescale`, for contiguous rows."""
    tokens, width = values.shape
    _rescale_kernel[(tokens,)](
        values, factor, width, BLOCK=BLOCK, enable_fp_fusion=False
    )
