"""One tile of the vocabulary at a time: the sums behind `TokenStats`, in plain PyTorch.

`add_tile` adds the logits of one tile to running sums over the vocabulary;
`gradient_tile` turns the policy's logits of a tile into their gradient. kernels.py has
the same two functions in Triton: this file is their documentation and their oracle.

With m the largest logit of the policy so far, c the difference d at that logit,
w_v = e^(h_v - m) and x_v = d_v - c, the sums are, per token,

    TOP m      CENTRE c      MASS Σw      LOGIT Σwh      RATIO Σwx      TOTAL Σh
    BACK Σw(e^-x - 1)       PLUS Σw(e^εx - 1)             MINUS Σw(e^-εx - 1)
    COLLISION Σw²           LOGIT_Y h[y]                  RATIO_Y d[y]

When m grows, all that hold a w are rescaled, and those that hold an x are moved to the
new c: with δ = c_new - c, Σw(e^tx - 1) becomes S + (e^-tδ - 1)(S + Σw).

Why x and not d: Δ±, the reference's log-probability and KL do not change when the same
number is subtracted from every d, and a mean of e^-x - 1 is never near -1, where
log1p has no digits left, as long as the policy's favourite token has some probability.
Where d = 0 everywhere, c = 0 and every sum of e^tx - 1 is exactly 0.

Such a mean loses its digits where it falls below -0.9, and where it was large before c
moved; above |tx| = 60 it may overflow. From then on a logsumexp takes its place, which
is NaN before:

    REFERENCE log Σe^h_ref    UP log Σe^(h + εd)          DOWN log Σe^(h - εd)
"""

import math

import torch

from .lm_head import Head

TOP, MASS, LOGIT, RATIO, BACK, PLUS, MINUS, COLLISION = range(8)
TOTAL, CENTRE, LOGIT_Y, RATIO_Y, REFERENCE, UP, DOWN, FIELDS = range(8, 16)
# The sums of e^tx - 1, and what takes their place, see `moved`.
MOVED, APART = slice(BACK, MINUS + 1), slice(REFERENCE, DOWN + 1)

# Tokens and vocabulary of a tile: 4 MiB per matrix, so that it stays in cache; and how
# many matrices `add_tile` works in.
CHUNK, TILE, MATRICES = 1024, 1024, 4

# The series of e^x - 1 ends where the next term is this small beside the first; where
# that takes more than four terms, e^x is computed.
NEGLIGIBLE, MOST_TERMS = 1.1e-7, 4
# Beyond these, a mean of e^tx - 1 may have lost its digits. (With c it moves by up to
# 1 + itself, of which float32 keeps 1e-7.)
WIDEST, SMALLEST_MEAN, LARGEST_MEAN = 60.0, -0.9, 100.0
# e^x as 2^(x log2 e): on CPUs several times as fast.
LOG2E = math.log2(math.e)


def tile_size(tokens: int) -> int:
    """Columns of a tile: twice as many where it meets few tokens."""
    return TILE if 2 * tokens > CHUNK else 2 * TILE


def new_sums(tokens: int, device: torch.device) -> torch.Tensor:
    """Sums over an empty vocabulary, shape (FIELDS, tokens)."""
    sums = torch.zeros(FIELDS, tokens, device=device)
    sums[TOP].fill_(-torch.inf)
    sums[APART].fill_(torch.nan)
    return sums


def new_weights(space: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `add_tile` may take as `out`: of its space, which is float32 as well."""
    return space[2]


def moved(epsilon: float | None) -> tuple[tuple[int, int, float], ...]:
    """The sums Σw(e^tx - 1), the logsumexp that replaces each, and t."""
    epsilon = epsilon or 0.0
    return (BACK, REFERENCE, -1.0), (PLUS, UP, epsilon), (MINUS, DOWN, -epsilon)


def log_mean(sums: torch.Tensor, field: int, apart: int, t: float) -> torch.Tensor:
    """log Σ_v p_v e^(t x_v), from a row of `moved`; shape (tokens,)."""
    lse = sums[TOP] + sums[MASS].log()
    difference = sums[apart] - t * sums[CENTRE] - lse
    exact = torch.log1p(sums[field] / sums[MASS])
    return torch.where(sums[apart].isnan(), exact, difference)


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
    """Adds a tile to the sums.

    Args:
        sums: Shape (FIELDS, chunk), changed in place.
        space: Shape (MATRICES, chunk, tile), float32, overwritten. The first two are
            weight @ hidden + bias of policy and reference.
        targets: Shape (chunk,), relative to the tile's start; others lie outside.
        heads: Of policy and reference, for what comes after the product.
        epsilon: Perturbation, or None to leave PLUS and MINUS at 0.
        collision: Whether COLLISION is wanted.
        out: If the gradient is made from this tile, shape (chunk, tile), float32: is
            filled with w times the slope of `Head.after`.

    Returns:
        e^(m_before - m), shape (chunk,), for what was added before.
    """
    h, r = heads[0].after(space[0]), heads[1].after(space[1])
    w, y = space[2] if out is None else out, space[3]
    before = sums.clone()
    _pick(sums[LOGIT_Y], h, targets)
    x = torch.sub(h, r, out=r)
    _pick(sums[RATIO_Y], x, targets)
    shrink, step = _follow_top(sums, h, x, epsilon)
    x.sub_(sums[CENTRE, :, None])
    widest = torch.maximum(x.amax(1), -x.amin(1))
    torch.sub(h, sums[TOP, :, None], out=w).mul_(LOG2E).exp2_()
    sums[MASS] += w.sum(1)
    sums[TOTAL] += h.sum(1)
    sums[LOGIT] += torch.mul(w, h, out=y).sum(1)
    if collision:
        sums[COLLISION] += torch.mul(w, w, out=y).sum(1)
    _add_differences(sums, w, x, y, epsilon, widest.max().item())
    _add_apart(sums, before, h, x, y, epsilon, torch.maximum(widest, step.abs()))
    if out is not None:
        _times(w, heads[0].slope(h))
    return shrink


def _follow_top(sums, h, d, epsilon) -> tuple[torch.Tensor, torch.Tensor]:
    """Where m grows: rescales the sums, and moves them to the d found there.

    Returns:
        e^(m_before - m), and δ, 0 where nothing was summed before; shape (chunk,).
    """
    top, step = torch.maximum(sums[TOP], h.amax(1)), torch.zeros_like(sums[TOP])
    shrink = torch.exp(sums[TOP] - top)
    grown = (top > sums[TOP]).nonzero()[:, 0]
    centre = d[grown, h[grown].argmax(1)]
    step[grown] = centre - sums[CENTRE, grown]
    sums[CENTRE, grown] = centre
    sums[TOP] = top
    sums[MASS:COLLISION] *= shrink
    sums[COLLISION] *= shrink**2
    step *= sums[MASS] > 0
    sums[RATIO] -= step * sums[MASS]
    t = sums.new_tensor([[t] for _, _, t in moved(epsilon)])
    sums[MOVED] += torch.expm1(-t * step) * (sums[MOVED] + sums[MASS])
    return shrink, step


def _add_differences(sums, w, x, y, epsilon, widest: float) -> None:
    """RATIO, BACK, PLUS and MINUS of a tile whose largest |x| is `widest`."""
    wanted = [(field, t, _terms(t * widest)) for field, _, t in moved(epsilon) if t]
    moments = [torch.mul(w, x, out=y).sum(1)]  # Σwx^k
    for _ in range(1, max(terms or 1 for _, _, terms in wanted)):
        moments.append(y.mul_(x).sum(1))
    sums[RATIO] += moments[0]
    for field, t, terms in wanted:
        if terms is None:
            sums[field] += _less_one(x, t, out=y).mul_(w).sum(1)
            continue
        for k, moment in enumerate(moments[:terms], 1):
            sums[field] += t**k / math.factorial(k) * moment


def _less_one(x: torch.Tensor, t: float, out: torch.Tensor) -> torch.Tensor:
    """e^tx - 1; to the last digit only where a sign depends on it."""
    if t == -1:
        return torch.mul(x, -LOG2E, out=out).exp2_().sub_(1)
    return torch.mul(x, t, out=out).expm1_()


def _terms(x: float) -> int | None:
    """Terms of the series of e^x - 1 that float32 can tell apart; None: too many."""
    few = range(1, MOST_TERMS + 1)
    enough = (n for n in few if abs(x) ** n < NEGLIGIBLE * math.factorial(n + 1))
    return next(enough, None)


def _add_apart(sums, before, h, x, y, epsilon, widest) -> None:
    """Keeps logsumexps where a mean has lost its digits; y is scratch."""
    means = sums[MOVED] / sums[MASS]
    digits = (means >= SMALLEST_MEAN) & (means <= LARGEST_MEAN) & sums[APART].isnan()
    for (field, apart, t), fine in zip(moved(epsilon), digits, strict=True):
        fine &= abs(t) * widest <= WIDEST
        if fine.all():
            continue
        lse = torch.add(h, x, alpha=t, out=y).logsumexp(1) + t * sums[CENTRE]
        so_far = (before[field] + before[MASS]).log()
        so_far += before[TOP] + t * before[CENTRE]
        known = torch.where(before[apart].isnan(), so_far, before[apart])
        lse = torch.logaddexp(known, lse)
        sums[apart] = torch.where(fine, sums[apart], lse)


def _pick(out: torch.Tensor, values: torch.Tensor, targets: torch.Tensor) -> None:
    """out = values[target], where the target lies in the tile."""
    size = values.shape[1]
    inside = (targets >= 0) & (targets < size)
    picked = values.gather(1, targets.clamp(0, size - 1)[:, None])[:, 0]
    torch.where(inside, picked, out, out=out)


def gradient_tile(
    policy: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad_logp: torch.Tensor,
    head: Head,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of Σ grad_logp · log p[y] for `weight @ hidden + bias`.

    d log p[y] / d logits = onehot(y) - p, then through cap and scale.

    Args:
        policy: As in `add_tile`; overwritten.
        targets: As in `add_tile`.
        lse: logsumexp of the whole vocabulary, shape (chunk,).
        grad_logp: Shape (chunk,).
        head: Of the policy.
        dtype: Of the result.

    Returns:
        Shape (chunk, tile).
    """
    h = head.after(policy)
    slope = head.slope(h)
    p = h.sub_(lse[:, None]).mul_(LOG2E).exp2_()
    inside = (targets >= 0) & (targets < h.shape[1])
    column = targets.clamp(0, h.shape[1] - 1)[:, None]
    p.scatter_add_(1, column, -inside[:, None].float())
    return _times(p.mul_(-grad_logp[:, None]), slope).to(dtype)


def _times(values: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    """values *= slope, without a pass over them where it is 1."""
    if not isinstance(slope, torch.Tensor) and slope == 1:
        return values
    return values.mul_(slope)


def rescale(values: torch.Tensor, factor: torch.Tensor) -> None:
    """values *= factor, shapes (chunk, width) and (chunk,)."""
    values *= factor[:, None]
