"""The functions of tiles.py in Triton, for logits that live on a GPU.

The products stay with cuBLAS, whose float32 output is read here once, one tile of it at
a time. One program holds one token's row of the tile in registers and forms all of its
sums from there; or it writes a piece of one row of a gradient.

Numbers are those of tiles.py up to float32 rounding. Products and sums are fused only
where `fma` says so: if the compiler fused the scale of one logit with the difference of
two, equal policies would differ by a rounding, and that decides steps. Under
TRITON_INTERPRET=1 the kernels run on a CPU.
"""

import torch
import triton
import triton.language as tl

from . import tile_torch as tiles
from .lm_head import Head
from .tile_torch import new_sums

__all__ = [
    "CHUNK",
    "MATRICES",
    "TILE",
    "add_tile",
    "gradient_tile",
    "new_sums",
    "new_weights",
    "rescale",
    "tile_size",
]

# As in tiles.py: 64 MiB per matrix, products large enough for tensor cores.
CHUNK, TILE, MATRICES = 4096, 4096, 2
# Of a gradient, what one program writes.
BLOCK = 1024

TOP = tl.constexpr(tiles.TOP)
MASS = tl.constexpr(tiles.MASS)
LOGIT = tl.constexpr(tiles.LOGIT)
RATIO = tl.constexpr(tiles.RATIO)
BACK = tl.constexpr(tiles.BACK)
PLUS = tl.constexpr(tiles.PLUS)
MINUS = tl.constexpr(tiles.MINUS)
COLLISION = tl.constexpr(tiles.COLLISION)
TOTAL = tl.constexpr(tiles.TOTAL)
CENTRE = tl.constexpr(tiles.CENTRE)
LOGIT_Y = tl.constexpr(tiles.LOGIT_Y)
RATIO_Y = tl.constexpr(tiles.RATIO_Y)
REFERENCE = tl.constexpr(tiles.REFERENCE)
UP = tl.constexpr(tiles.UP)
DOWN = tl.constexpr(tiles.DOWN)
WIDEST = tl.constexpr(tiles.WIDEST)
SMALLEST_MEAN = tl.constexpr(tiles.SMALLEST_MEAN)
LARGEST_MEAN = tl.constexpr(tiles.LARGEST_MEAN)
# Below it, four terms of the series of e^x - 1 are enough.
SERIES = tl.constexpr(0.06)


def tile_size(tokens: int) -> int:
    """As `tiles.tile_size`: few tokens meet wide tiles, so products stay large."""
    return TILE if 2 * tokens > CHUNK else 2 * TILE


def new_weights(space: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `tiles.new_weights`, in the dtype that the next product takes."""
    return torch.empty_like(space[0], dtype=dtype)


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
def _after(h, scale, cap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """`Head.after`: scale, then cap · tanh(h / cap)."""
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
def _add_moved(
    sums, stride, field, apart, w, h, x, inside, t, widest, top, centre, mass
):
    """Adds a row to Σw(e^tx - 1), and moves it to a new top, centre and mass.

    As in `tiles._add_apart`, a logsumexp takes its place where it has lost its digits.
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
    known = tl.load(sums + apart * stride)
    if (known == known) | (digits == 0):
        so_far = top_before + tl.log(before + mass_before) + t * centre_before
        known = tl.where(known == known, known, so_far)
        values = tl.where(inside, tl.fma(x, t, h), float("-inf"))
        highest = tl.max(values, 0)
        lse = highest + tl.log(tl.sum(tl.exp(values - highest), 0)) + t * centre
        tl.store(sums + apart * stride, _log_add(known, lse))


@triton.jit
def _add_tile_kernel(
    policy,
    reference,
    targets,
    sums,
    weights,
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
    COLLIDING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row = token.to(tl.int64) * tile
    sums += token
    v = tl.arange(0, BLOCK)
    inside = v < tile
    h = tl.load(policy + row + v, mask=inside, other=0.0)
    r = tl.load(reference + row + v, mask=inside, other=0.0)
    h = _after(h, scale, cap, SCALED, CAPPED)
    r = _after(r, reference_scale, reference_cap, REFERENCE_SCALED, REFERENCE_CAPPED)
    d = h - r
    tl.store(sums + TOTAL * stride, tl.load(sums + TOTAL * stride) + tl.sum(h, 0))

    # the largest logit so far, and d there
    top_before = tl.load(sums + TOP * stride)
    centre_before = tl.load(sums + CENTRE * stride)
    highest = tl.max(tl.where(inside, h, float("-inf")), 0)
    centre = tl.max(tl.where(inside & (h == highest), d, float("-inf")), 0)
    centre = tl.where(highest > top_before, centre, centre_before)
    top = tl.maximum(top_before, highest)
    shrink = tl.exp(top_before - top)
    tl.store(shrinks + token, shrink)

    w = tl.where(inside, tl.exp(h - top), 0.0)
    x = tl.where(inside, d - centre, 0.0)
    widest = tl.max(tl.abs(x), 0)
    if WEIGHTED:
        p = _times_slope(w, h, scale, cap, SCALED, CAPPED)
        _store(weights + row + v, p, inside)
    logit = tl.load(sums + LOGIT * stride) * shrink + tl.sum(w * h, 0)
    tl.store(sums + LOGIT * stride, logit)
    if COLLIDING:
        collision = tl.load(sums + COLLISION * stride) * shrink * shrink
        tl.store(sums + COLLISION * stride, collision + tl.sum(w * w, 0))
    moving = tl.load(sums + MASS * stride) * shrink
    mass = moving + tl.sum(w, 0)
    step = tl.where(moving > 0, centre - centre_before, 0.0)
    ratio = tl.load(sums + RATIO * stride) * shrink - step * moving
    tl.store(sums + RATIO * stride, ratio + tl.sum(w * x, 0))
    back = sums, stride, BACK, REFERENCE, w, h, x, inside, -1.0
    _add_moved(*back, widest, top, centre, mass)
    if PERTURBED:
        plus = sums, stride, PLUS, UP, w, h, x, inside, epsilon
        _add_moved(*plus, widest, top, centre, mass)
        minus = sums, stride, MINUS, DOWN, w, h, x, inside, -epsilon
        _add_moved(*minus, widest, top, centre, mass)
    tl.store(sums + TOP * stride, top)
    tl.store(sums + CENTRE * stride, centre)
    tl.store(sums + MASS * stride, mass)

    y = tl.load(targets + token)
    if (y >= 0) & (y < tile):
        tl.store(sums + LOGIT_Y * stride, tl.sum(tl.where(v == y, h, 0.0), 0))
        tl.store(sums + RATIO_Y * stride, tl.sum(tl.where(v == y, d, 0.0), 0))


def add_tile(
    sums: torch.Tensor,
    space: torch.Tensor,
    targets: torch.Tensor,
    heads: tuple[Head, Head],
    *,
    epsilon: float | None,
    collision: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """As `tiles.add_tile`; the logits are left as they are, `out` has any dtype."""
    policy, reference = space
    tokens, tile = policy.shape
    shrinks = torch.empty_like(sums[0])
    block = triton.next_power_of_2(max(tile, TILE))
    _add_tile_kernel[(tokens,)](
        policy,
        reference,
        targets,
        sums,
        policy if out is None else out,
        shrinks,
        tile,
        sums.stride(0),
        epsilon or 0.0,
        *_numbers(heads[0]),
        *_numbers(heads[1]),
        *_flags(heads[0]),
        *_flags(heads[1]),
        PERTURBED=epsilon is not None,
        COLLIDING=collision,
        WEIGHTED=out is not None,
        BLOCK=block,
        num_warps=warps(block),
        enable_fp_fusion=False,
    )
    return shrinks


def warps(block: int) -> int:
    """So many that a thread holds 16 logits."""
    return min(max(block // 512, 1), 32)


def _numbers(head: Head) -> tuple[float, float]:
    """Scale and cap."""
    return float(head.scale), float(head.cap or 1.0)


def _flags(head: Head) -> tuple[bool, bool]:
    """SCALED and CAPPED."""
    return head.scale != 1, head.cap is not None


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
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row = token.to(tl.int64) * tile
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(policy + row + v, mask=v < tile, other=0.0)
    h = _after(h, scale, cap, SCALED, CAPPED)
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
        *_numbers(head),
        *_flags(head),
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
