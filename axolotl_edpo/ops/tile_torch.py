"""Running sums over the vocabulary, from which `TokenStats` follow, in plain PyTorch.

`add_tile` adds the logits of one tile of the vocabulary to the sums. `gradient_tile`
turns the policy's logits of a tile into their gradient. tile_triton.py has the same
functions in Triton; they are documented here.

h and h_ref are the logits of policy and reference, and d = h - h_ref. m is the largest
h so far, and c is d at that word. With w_v = e^(h_v - m) and x_v = d_v - c, the sums
are, for each token,

    TOP           m               MASS        Σ w
    CENTRE        c               TOTAL       Σ h
    LOGIT         Σ w h           SQUARES     Σ w²
    DIFFERENCE    Σ w x           LOGIT_Y     h[y]
    BACK          Σ w (e^-x - 1)  DIFFERENCE_Y  d[y]
    PLUS          Σ w (e^εx - 1)
    MINUS         Σ w (e^-εx - 1)

When m grows, every sum that contains w is rescaled. Every sum that contains x is
changed to the new c: with δ = c_new - c, a sum S = Σ w (e^tx - 1) becomes
S + (e^-tδ - 1)(S + Σ w).

Why x and not d? The statistics do not change if the same number is subtracted from
every d. The term of the most likely word is exactly 0 with x. So the mean of e^-x - 1
is not near -1, where log1p is inexact, unless that word has almost no probability. If
all d are 0, then c = 0, and every sum of e^tx - 1 is exactly 0.

The mean Σ w (e^tx - 1) / Σ w becomes inexact if it falls below -0.9, or if it is large
when c changes. Where |tx| > 60 it may overflow. From then on a logsumexp is used
instead. Until then the field of the logsumexp is NaN:

    REFERENCE     log Σ e^h_ref
    UP            log Σ e^(h + εd)
    DOWN          log Σ e^(h - εd)

If only the policy is scored, there is no h_ref, and the sums with c or x are 0.
"""

import math
from collections.abc import Sequence

import torch

from .lm_head import Head

TOP, MASS, LOGIT, DIFFERENCE, BACK, PLUS, MINUS, SQUARES = range(8)
TOTAL, CENTRE, LOGIT_Y, DIFFERENCE_Y, REFERENCE, UP, DOWN, FIELDS = range(8, 16)
# The sums of e^tx - 1, and the logsumexps that replace them, see `expm1_sums`.
EXPM1_SUMS, LOGSUMEXPS = slice(BACK, MINUS + 1), slice(REFERENCE, DOWN + 1)

# Tokens of a chunk, words of a tile, and matrices of this size that `add_tile` needs.
# A matrix has 4 MiB, so that it stays in cache.
CHUNK, TILE, MATRICES = 1024, 1024, 4

# The series of e^x - 1 ends when the next term divided by the first is below
# NEGLIGIBLE. If that needs more than MOST_TERMS terms, e^x is computed.
NEGLIGIBLE, MOST_TERMS = 1.1e-7, 4
# Bounds of |tx| and of the mean of e^tx - 1. Outside of them a logsumexp is used: when
# c changes, the mean changes by up to 1 + mean, with a relative error of 1e-7.
WIDEST, SMALLEST_MEAN, LARGEST_MEAN = 60.0, -0.9, 100.0
# On CPUs 2^(x log2 e) is several times as fast as e^x.
LOG2E = math.log2(math.e)


def tile_size(tokens: int) -> int:
    """Words of a tile: TILE, or twice as many for few tokens."""
    return TILE if 2 * tokens > CHUNK else 2 * TILE


def new_sums(tokens: int, device: torch.device) -> torch.Tensor:
    """The sums before the first tile: shape (FIELDS, tokens), float32."""
    sums = torch.zeros(FIELDS, tokens, device=device)
    sums[TOP].fill_(-torch.inf)
    sums[LOGSUMEXPS].fill_(torch.nan)
    return sums


def new_numerators(space: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Space for the numerators of `add_tile`: one of its matrices.

    Args:
        space: The matrices of `add_tile`.
        dtype: Not used here: the numerators are float32.

    Returns:
        Shape (chunk, tile).
    """
    return space[-2]


def expm1_sums(epsilon: float | None) -> tuple[tuple[int, int, float], ...]:
    """For each sum Σ w (e^tx - 1): its field, the field of its logsumexp, and t."""
    epsilon = epsilon or 0.0
    return (BACK, REFERENCE, -1.0), (PLUS, UP, epsilon), (MINUS, DOWN, -epsilon)


def log_mean(sums: torch.Tensor, field: int, lse_field: int, t: float) -> torch.Tensor:
    """log Σ_v p_v e^(t x_v), shape (tokens,).

    Args:
        sums: Shape (FIELDS, tokens).
        field: The field of the sum, see `expm1_sums`.
        lse_field: The field of its logsumexp.
        t: Its t.
    """
    lse = sums[TOP] + sums[MASS].log()
    difference = sums[lse_field] - t * sums[CENTRE] - lse
    exact = torch.log1p(sums[field] / sums[MASS])
    return torch.where(sums[lse_field].isnan(), exact, difference)


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
    """Adds a tile to the sums.

    Args:
        sums: Shape (FIELDS, chunk), changed in place.
        space: Shape (MATRICES, chunk, tile), float32, overwritten. The first two are
            the logits of policy and reference before scale and cap. If only the policy
            is scored, there is one matrix less.
        targets: Shape (chunk,): y minus the first word of the tile. If y is in another
            tile, this is below 0 or at least the size of the tile.
        heads: The heads of policy and reference, for their scale and cap; only that of
            the policy, if only it is scored.
        epsilon: Perturbation, 0 < ε < 1; None: PLUS and MINUS stay 0.
        sum_sq_probs: Whether to compute SQUARES.
        numerators: Shape (chunk, tile), float32: overwritten with w times `Head.slope`,
            for the gradient. None: not wanted.

    Returns:
        e^(m_before - m), shape (chunk,): the factor that rescales earlier sums of w.
    """
    h = heads[0].scale_and_cap(space[0])
    w, y = space[-2] if numerators is None else numerators, space[-1]
    before = sums.clone()
    _pick(sums[LOGIT_Y], h, targets)
    shrink = _follow_top(sums, h)
    if compared := len(heads) > 1:
        x = torch.sub(h, heads[1].scale_and_cap(space[1]), out=space[1])
        _pick(sums[DIFFERENCE_Y], x, targets)
        step = _move_centre(sums, before, h, x, epsilon)
    torch.sub(h, sums[TOP, :, None], out=w).mul_(LOG2E).exp2_()
    sums[MASS] += w.sum(1)
    sums[TOTAL] += h.sum(1)
    sums[LOGIT] += torch.mul(w, h, out=y).sum(1)
    if sum_sq_probs:
        sums[SQUARES] += torch.mul(w, w, out=y).sum(1)
    if compared:
        widest = torch.maximum(x.amax(1), -x.amin(1))
        _add_differences(sums, w, x, y, epsilon, widest.max().item())
        widest = torch.maximum(widest, step.abs())
        _keep_logsumexps(sums, before, h, x, y, epsilon, widest)
    if numerators is not None:
        _times(w, heads[0].slope(h))
    return shrink


def _follow_top(sums, h) -> torch.Tensor:
    """Rescales the sums where m grows.

    Returns:
        e^(m_before - m), shape (chunk,).
    """
    top = torch.maximum(sums[TOP], h.amax(1))
    shrink = torch.exp(sums[TOP] - top)
    sums[TOP] = top
    sums[MASS:SQUARES] *= shrink
    sums[SQUARES] *= shrink**2
    return shrink


def _move_centre(sums, before, h, d, epsilon) -> torch.Tensor:
    """Where m grew, changes the sums to the new c; then d becomes x, in place.

    Returns:
        δ, shape (chunk,); 0 for the first tile.
    """
    step = torch.zeros_like(sums[TOP])
    grown = (sums[TOP] > before[TOP]).nonzero()[:, 0]
    centre = d[grown, h[grown].argmax(1)]
    step[grown] = centre - sums[CENTRE, grown]
    sums[CENTRE, grown] = centre
    step *= sums[MASS] > 0
    sums[DIFFERENCE] -= step * sums[MASS]
    t = sums.new_tensor([[t] for _, _, t in expm1_sums(epsilon)])
    sums[EXPM1_SUMS] += torch.expm1(-t * step) * (sums[EXPM1_SUMS] + sums[MASS])
    d.sub_(sums[CENTRE, :, None])
    return step


def _add_differences(sums, w, x, y, epsilon, widest: float) -> None:
    """Adds a tile to DIFFERENCE, BACK, PLUS and MINUS; `widest` is its largest |x|."""
    fields = [(field, t) for field, _, t in expm1_sums(epsilon) if t]
    wanted = [(field, t, _terms(t * widest)) for field, t in fields]
    moments = [torch.mul(w, x, out=y).sum(1)]  # Σwx^k
    for _ in range(1, max(terms or 1 for _, _, terms in wanted)):
        moments.append(y.mul_(x).sum(1))
    sums[DIFFERENCE] += moments[0]
    for field, t, terms in wanted:
        if terms is None:
            sums[field] += _less_one(x, t, out=y).mul_(w).sum(1)
            continue
        for k, moment in enumerate(moments[:terms], 1):
            sums[field] += t**k / math.factorial(k) * moment


def _less_one(x: torch.Tensor, t: float, out: torch.Tensor) -> torch.Tensor:
    """e^tx - 1."""
    if t == -1:  # BACK decides no sign, so exp2 - 1 is exact enough
        return torch.mul(x, -LOG2E, out=out).exp2_().sub_(1)
    return torch.mul(x, t, out=out).expm1_()


def _terms(x: float) -> int | None:
    """How many terms of the series of e^x - 1 float32 needs; None if too many."""
    few = range(1, MOST_TERMS + 1)
    enough = (n for n in few if abs(x) ** n < NEGLIGIBLE * math.factorial(n + 1))
    return next(enough, None)


def _keep_logsumexps(sums, before, h, x, y, epsilon, widest) -> None:
    """Adds the tile to the logsumexps of tokens whose mean is inexact; overwrites y."""
    means, unused = sums[EXPM1_SUMS] / sums[MASS], sums[LOGSUMEXPS].isnan()
    digits = (means >= SMALLEST_MEAN) & (means <= LARGEST_MEAN) & unused
    for (field, lse_field, t), fine in zip(expm1_sums(epsilon), digits, strict=True):
        fine &= abs(t) * widest <= WIDEST
        if fine.all():
            continue
        lse = torch.add(h, x, alpha=t, out=y).logsumexp(1) + t * sums[CENTRE]
        so_far = (before[field] + before[MASS]).log()
        so_far += before[TOP] + t * before[CENTRE]
        so_far = torch.where(before[lse_field].isnan(), so_far, before[lse_field])
        lse = torch.logaddexp(so_far, lse)
        sums[lse_field] = torch.where(fine, sums[lse_field], lse)


def _pick(out: torch.Tensor, values: torch.Tensor, targets: torch.Tensor) -> None:
    """Writes values[target] into `out`, for targets that are in the tile."""
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
    """Gradient of the loss for the policy's logits before scale and cap.

    It is grad_logp · (onehot(y) - p), times `Head.slope`.

    Args:
        policy: Logits before scale and cap, shape (chunk, tile), float32, overwritten.
        targets: Shape (chunk,): y minus the first word of the tile.
        lse: logsumexp over the whole vocabulary, shape (chunk,).
        grad_logp: ∂ loss / ∂ log p[y], shape (chunk,).
        head: The policy's head.
        dtype: Of the result.

    Returns:
        Shape (chunk, tile).
    """
    h = head.scale_and_cap(policy)
    slope = head.slope(h)
    p = h.sub_(lse[:, None]).mul_(LOG2E).exp2_()
    inside = (targets >= 0) & (targets < h.shape[1])
    column = targets.clamp(0, h.shape[1] - 1)[:, None]
    p.scatter_add_(1, column, -inside[:, None].float())
    return _times(p.mul_(-grad_logp[:, None]), slope).to(dtype)


def _times(values: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    """Multiplies `values` with the slope in place; does nothing if it is 1."""
    if not isinstance(slope, torch.Tensor) and slope == 1:
        return values
    return values.mul_(slope)


def rescale(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies each row of `values`, (chunk, width), with its factor, (chunk,)."""
    values *= factor[:, None]
