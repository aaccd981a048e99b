"""One tile of the vocabulary at a time: the sums behind `TokenStats`, in plain PyTorch.

`add_tile` adds the logits of one tile to running sums over the vocabulary;
`gradient_tile` turns the policy's logits of a tile into their gradient. kernels.py has
the same two functions in Triton: this file is their documentation and their oracle.

With m the largest logit so far and w_v = e^(h_v - m), the sums are, per token,

    TOP m      MASS Σw      LOGIT Σwh      RATIO Σwd      TOTAL Σh     WIDEST max|d|
    BACK Σw(e^-d - 1)       PLUS Σw(e^εd - 1)             MINUS Σw(e^-εd - 1)
    COLLISION Σw²           LOGIT_Y h[y]                  RATIO_Y d[y]

and all that hold a w are rescaled when m grows.
"""

import torch

from .head import Head

TOP, MASS, LOGIT, RATIO, BACK, PLUS, MINUS, COLLISION = range(8)
TOTAL, WIDEST, LOGIT_Y, RATIO_Y, FIELDS = range(8, 13)

# Tokens and vocabulary of a tile: 4 MiB per matrix, so that it stays in cache; and how
# many matrices `add_tile` works in.
CHUNK, TILE, MATRICES = 1024, 1024, 4

# Below it, four terms of the series of e^x - 1 are enough: the fifth is 1e-7 of it.
SERIES = 0.06


def new_sums(tokens: int, device: torch.device) -> torch.Tensor:
    """Sums over an empty vocabulary, shape (FIELDS, tokens)."""
    sums = torch.zeros(FIELDS, tokens, device=device)
    sums[TOP] = -torch.inf
    return sums


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
    """Adds a tile to the sums.

    Args:
        sums: Shape (FIELDS, chunk), changed in place.
        space: Shape (MATRICES, chunk, tile), float32, overwritten. The first two are
            weight @ hidden + bias of policy and reference.
        targets: Shape (chunk,), relative to the tile's start; others lie outside.
        heads: Of policy and reference, for what comes after the product.
        epsilon: Perturbation, or None to leave PLUS and MINUS at 0.
        collision: Whether COLLISION is wanted.
        weights_as: A dtype if the gradient is made from this tile.

    Returns:
        w times the slope of `Head.after`, shape (chunk, tile), where `weights_as` asks
        for it, and e^(m_before - m), shape (chunk,), for what was added before.
    """
    h, r, w, x = space
    h, r = heads[0].after(h), heads[1].after(r)
    top = torch.maximum(sums[TOP], h.amax(1))
    shrink = torch.exp(sums[TOP] - top)
    sums[TOP] = top
    sums[MASS:COLLISION] *= shrink
    sums[COLLISION] *= shrink**2
    sums[TOTAL] += h.sum(1)
    d = torch.sub(h, r, out=r)
    widest = torch.maximum(d.amax(1), -d.amin(1))
    sums[WIDEST] = torch.maximum(sums[WIDEST], widest)
    _pick(sums[LOGIT_Y], h, targets)
    _pick(sums[RATIO_Y], d, targets)
    torch.sub(h, top[:, None], out=w).exp_()
    sums[MASS] += w.sum(1)
    sums[LOGIT] += torch.mul(w, h, out=x).sum(1)
    sums[BACK] += torch.neg(d, out=x).expm1_().mul_(w).sum(1)
    if collision:
        sums[COLLISION] += torch.mul(w, w, out=x).sum(1)
    first = torch.mul(w, d, out=x).sum(1)
    sums[RATIO] += first
    if epsilon is not None:
        small = epsilon * widest.max().item() < SERIES
        perturbed = _series(first, x, d, epsilon) if small else _exact(w, d, x, epsilon)
        sums[PLUS] += perturbed[0]
        sums[MINUS] += perturbed[1]
    if weights_as is not None:
        w = _times(w, heads[0].slope(h)).to(weights_as)
    return w, shrink


def _series(first, wd, d, epsilon) -> tuple[torch.Tensor, torch.Tensor]:
    """Σw(e^(±εd) - 1) = Σ_k (±ε)^k/k! Σwd^k, from wd and its sum, without an exp."""
    second, third, fourth = (wd.mul_(d).sum(1) for _ in range(3))
    even = epsilon**2 / 2 * second + epsilon**4 / 24 * fourth
    odd = epsilon * first + epsilon**3 / 6 * third
    return even + odd, even - odd


def _exact(w, d, x, epsilon) -> tuple[torch.Tensor, torch.Tensor]:
    """Σw(e^(±εd) - 1) for any d."""
    plus, minus = (
        torch.mul(d, sign * epsilon, out=x).expm1_().mul_(w).sum(1) for sign in (1, -1)
    )
    return plus, minus


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
    p = h.sub_(lse[:, None]).exp_()
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
