"""Gradients of log-probabilities, summed tile by tile over the vocabulary.

    ∂ policy_logp / ∂ hidden = weight[y] - Σ_v p_v weight[v]
    ∂ policy_logp / ∂ weight = (onehot(y) - p)ᵀ hidden

The two factors of a LoRA adapter have gradients of the same form. `InputGradients`
computes the first formula in forward. The gradient of the loss is only a factor per
token in it, so backward can multiply with it. `add_gradients` computes both formulas in
backward, from logits that are computed a second time.
"""

from collections.abc import Sequence

import torch

from . import lm_head
from .operands import HeadLogits, Operands
from .tile_torch import LOGIT_Y, MASS
from .walk import Call, Cell, walk


class RowSums:
    """Float32 sums for some rows of several gradients, which may be in 16 bits.

    Args:
        gradients: Each of shape (rows, ...); None where no gradient is wanted.
    """

    def __init__(self, gradients: Sequence[torch.Tensor | None]):
        self._gradients = gradients
        self._first_row = 0
        self._sums: list[torch.Tensor | None] = []

    def reset(self, rows: slice) -> None:
        """Sets the sums to zero, for these rows of the gradients."""
        self._first_row = rows.start
        self._sums = [
            None if x is None else torch.zeros(x[rows].shape, device=x.device)
            for x in self._gradients
        ]

    def at(self, rows: slice) -> list[torch.Tensor]:
        """The sums at these rows, one for each gradient that is wanted."""
        within = slice(rows.start - self._first_row, rows.stop - self._first_row)
        return [x[within] for x in self._sums if x is not None]

    def add_products(
        self, rows: slice, left: torch.Tensor, rights: Sequence[torch.Tensor]
    ) -> None:
        """Adds left @ right to the sums at these rows.

        Args:
            rows: Rows of the gradients, as many as `left` has.
            left: Shape (rows, inner).
            rights: One per gradient, each of shape (inner, width).
        """
        pairs = zip(rights, self._gradients, strict=True)
        wanted = (right for right, gradient in pairs if gradient is not None)
        for sums, right in zip(self.at(rows), wanted, strict=True):
            lm_head.add_product(left, right, sums)

    def flush(self, rows: slice) -> None:
        """Adds the sums at these rows to the gradients."""
        wanted = (x for x in self._gradients if x is not None)
        for gradient, sums in zip(wanted, self.at(rows), strict=True):
            gradient[rows] += sums


class InputGradients:
    """∂ policy_logp / ∂ input for each input of the policy, computed in forward.

    `add` sums w · weight over the vocabulary, with w = e^(h - m) and m the largest
    logit so far. `finish` divides by Σ w, which gives the mean Σ p · weight.

    Args:
        call: The call of the op.
        policy: Hidden states and head of the policy.

    Attributes:
        values: One gradient per input, with its shape and dtype; filled by `finish`.
    """

    def __init__(self, call: Call, policy: HeadLogits):
        self.values = [torch.empty_like(x) for x in policy.inputs]
        self._call, self._policy = call, policy
        self._weighted = RowSums(self.values)

    def add(self, cell: Cell, w: torch.Tensor, shrink: torch.Tensor) -> None:
        """Adds the words of a cell to the sums of its tokens.

        Args:
            cell: The cell.
            w: Numerators of the cell, see `tile_torch.add_tile`; shape (chunk, tile).
            shrink: e^(m_before - m), shape (chunk,).
        """
        if cell.opens_block:
            self._weighted.reset(cell.block)
        for sums in self._weighted.at(cell.chunk):
            self._call.tile_ops.rescale(sums, shrink)
        self._weighted.add_products(cell.chunk, w, cell.weights)

    def finish(self, chunk: slice, sums: torch.Tensor) -> None:
        """Computes the gradients of some tokens, after the last tile of the vocabulary.

        Args:
            chunk: The tokens.
            sums: The sums of `tile_torch`, shape (FIELDS, tokens).
        """
        slope = self._policy.head.slope(sums[LOGIT_Y, chunk, None])
        weights = self._policy.weight_rows(self._call.targets[chunk])
        weighted = self._weighted.at(chunk)
        for value, mean, weight in zip(self.values, weighted, weights, strict=True):
            mean /= -sums[MASS, chunk, None]
            value[chunk] = mean.add_(weight.float() * slope)


def add_gradients(
    call: Call,
    policy: HeadLogits,
    lse: torch.Tensor,
    grad_logp: torch.Tensor,
    gradients: Operands[torch.Tensor | None],
) -> None:
    """Adds ∂ loss / ∂ factor to the gradient of each factor, cell by cell.

    Args:
        call: The call of the op.
        policy: Hidden states and head of the policy.
        lse: logsumexp of the policy's logits, shape (tokens,).
        grad_logp: ∂ loss / ∂ policy_logp, shape (tokens,).
        gradients: One per factor, with its shape; None: not wanted.
    """
    d_inputs, d_weights = RowSums(gradients.inputs), RowSums(gradients.weights)
    d_bias = RowSums([gradients.bias])
    for cell in walk(call, [policy], matrices=1):
        if cell.opens_block:
            d_inputs.reset(cell.block)
        if cell.opens_tile:
            d_weights.reset(cell.tile)
            d_bias.reset(cell.tile)
        g = call.tile_ops.gradient_tile(
            cell.space[0],
            call.targets_in(cell),
            lse[cell.chunk],
            grad_logp[cell.chunk],
            policy.head,
            cell.weights[0].dtype,
        )
        # (chunk, tile) @ (tile, width) and (tile, chunk) @ (chunk, width)
        d_inputs.add_products(cell.chunk, g, cell.weights)
        d_weights.add_products(cell.tile, g.T, [x[cell.chunk] for x in policy.inputs])
        for sums in d_bias.at(cell.tile):
            sums += g.sum(0, dtype=torch.float32)
        if cell.closes_tile:
            d_weights.flush(cell.tile)
            d_bias.flush(cell.tile)
        if cell.is_last_tile:
            d_inputs.flush(cell.chunk)


def scale_rows(
    gradients: Sequence[torch.Tensor], grad_logp: torch.Tensor
) -> list[torch.Tensor]:
    """Multiplies each row with ∂ loss / ∂ policy_logp of its token.

    Args:
        gradients: Each of shape (tokens, width).
        grad_logp: Shape (tokens,), float32.

    Returns:
        New tensors of the same shapes and dtypes, rounded once.
    """
    # computed in float32: a rounded factor would be the same error in a whole sequence
    return [
        torch.mul(x, grad_logp[:, None], out=torch.empty_like(x)) for x in gradients
    ]
