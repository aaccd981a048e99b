"""Keeps the policy's probabilities from forward to backward, if the head trains.

    ∂ policy_logp / ∂ weight = (onehot(y) - p)ᵀ hidden

needs p of every word, times the gradient of the loss, which is known only in backward.
Forward computes each tile of p once, as w = e^(h - m) with m the largest logit so far.
If all w fit into KEPT_BYTES, they are kept. Then backward does not compute the logits a
second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import lm_head
from .lm_head import Tensors, rows_of
from .operands import HeadLogits
from .walk import Call

# Most bytes to keep. If more are needed, backward computes the logits a second time.
KEPT_BYTES = 2**29
# The smallest factor, e^-69: a quotient by it stays within the range of bfloat16.
LEAST_FACTOR = 1e-30


@dataclass(frozen=True)
class KeptProbs:
    """onehot(y) - p as a product: numerators times factors.

    Attributes:
        numerators: One value per token and word, shape (tokens x vocab,): tile after
            tile, each a matrix of shape (tokens, tile). The values are the numerators
            of `add_tile`; `finish` replaces those of the targets.
        factors: One value per tile and token, shape (tiles, tokens), float32. Before
            `finish`: the m for which the w of the tile was computed. After it:
            -e^(m - logsumexp).
    """

    numerators: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def if_they_fit(cls, call: Call, policy: HeadLogits) -> "KeptProbs | None":
        """Empty space for the probabilities, if KEPT_BYTES are enough.

        Args:
            call: The call of the op.
            policy: Hidden states and head of the policy.

        Returns:
            None if they need more than KEPT_BYTES, or if they would be in float16,
            whose range is too small.
        """
        tokens = len(call.targets)
        row = rows_of(policy.operands.weight, slice(0, 1), policy.operands.hidden)
        fits = tokens * call.vocab * row.itemsize <= KEPT_BYTES
        if not fits or row.dtype == torch.float16:
            return None
        tiles = len([*call.tiles()])
        numerators = row.new_empty(tokens * call.vocab)
        return cls(numerators, torch.empty(tiles, tokens, device=row.device))

    @property
    def tensors(self) -> Tensors:
        """Numerators and factors, for an autograd.Function to save."""
        return self.numerators, self.factors

    def at(self, tile: slice) -> torch.Tensor:
        """The numerators of a tile, shape (tokens, tile)."""
        tokens = self.factors.shape[1]
        part = self.numerators[tokens * tile.start : tokens * tile.stop]
        return part.view(tokens, tile.stop - tile.start)

    def finish(
        self,
        call: Call,
        lse: torch.Tensor,
        logp: torch.Tensor,
        slope_y: torch.Tensor | float,
    ) -> None:
        """Turns numerators and factors into onehot(y) - p.

        Args:
            call: The call of the op, with its targets y.
            lse: logsumexp of the policy's logits, shape (tokens,).
            logp: log p[y], shape (tokens,).
            slope_y: `Head.slope` at the logit of y, a number or of shape (tokens,).
        """
        factors = torch.exp(self.factors - lse).clamp_(min=LEAST_FACTOR).neg_()
        self.factors.copy_(factors)
        tile = call.targets // call.tile_size
        start = tile * call.tile_size
        columns = (call.vocab - start).clamp(max=call.tile_size)
        tokens = torch.arange(len(lse), device=lse.device)
        index = len(lse) * start + tokens * columns + call.targets - start
        # -expm1(logp) is 1 - p[y] without cancellation
        at_y = -torch.expm1(logp) * slope_y / factors.gather(0, tile[None])[0]
        self.numerators.scatter_(0, index, at_y.to(self.numerators.dtype))

    def write_gradients(
        self,
        call: Call,
        grad_logp: torch.Tensor,
        gradients: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Computes the gradients of weights, tile by tile. Call `finish` before.

        Args:
            call: The call of the op.
            grad_logp: ∂ loss / ∂ policy_logp, shape (tokens,).
            gradients: For each weight a pair: its gradient, which is overwritten, of
                shape (vocab, width), and the input that the weight is multiplied with,
                of shape (tokens, width).
        """
        dtype = self.numerators.dtype
        scaled = [torch.empty_like(x, dtype=dtype) for _, x in gradients]
        for tile, factor in zip(call.tiles(), self.factors, strict=True):
            scale = (grad_logp * factor)[:, None]
            for (gradient, x), space in zip(gradients, scaled, strict=True):
                torch.mul(x, scale, out=space)
                _write_rounded_product(self.at(tile).T, space, gradient[tile])


def _write_rounded_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Computes a @ b in float32, and writes it into `out`, rounded to its dtype."""
    wide = out.dtype == torch.float32
    exact = out if wide else torch.empty_like(out, dtype=torch.float32)
    lm_head.product(a, b, exact)
    out.copy_(exact)
