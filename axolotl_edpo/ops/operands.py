"""The logits of policy or reference, computed for some tokens and some words at a time.

There are two sources with the same methods: `HeadLogits` multiplies hidden states with
a head, and `ReadyLogits` holds logits that a model has computed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import torch

from . import lm_head
from .lm_head import Head, Rows, Tensors, rows_of

T = TypeVar("T")


@dataclass(frozen=True)
class Operands(Generic[T]):
    """One value for each factor of the logits.

        logits = hidden @ weight.T + Σ low @ up.T + bias

    T says what the values are: the factors, their gradients, their dtypes, or whether
    their gradients are wanted.

    Attributes:
        hidden: Shape (tokens, hidden).
        weight: Shape (vocab, hidden), a tensor or quantized.
        bias: Shape (vocab,) or None.
        lora: For each adapter on the head the two factors `low`, which is
            `down(hidden)`, of shape (tokens, rank), and `up`, of shape (vocab, rank).
    """

    hidden: T
    weight: T
    bias: T
    lora: tuple[tuple[T, T], ...] = ()

    @classmethod
    def from_flat(cls, values: Iterable[T]) -> "Operands[T]":
        """From the values in the order of `flat`."""
        hidden, weight, bias, *lora = values
        adapters = zip(lora[0::2], lora[1::2], strict=True)
        return cls(hidden, weight, bias, tuple(adapters))

    @classmethod
    def from_parts(
        cls, inputs: Iterable[T], weights: Iterable[T], bias: T
    ) -> "Operands[T]":
        """From the values of `inputs`, `weights` and `bias`."""
        (hidden, weight), *lora = zip(inputs, weights, strict=True)
        return cls(hidden, weight, bias, tuple(lora))

    @property
    def flat(self) -> tuple[T, ...]:
        """All values in one tuple, as arguments of an autograd.Function."""
        return self.hidden, self.weight, self.bias, *chain(*self.lora)

    @property
    def inputs(self) -> tuple[T, ...]:
        """The values for factors with a row per token: `hidden`, then each `low`."""
        return self.hidden, *(low for low, _ in self.lora)

    @property
    def weights(self) -> tuple[T, ...]:
        """The values for factors with a row per word: `weight`, then each `up`."""
        return self.weight, *(up for _, up in self.lora)

    @property
    def of_head(self) -> tuple[T, ...]:
        """The values for the factors of the head: bias and weights."""
        return self.bias, *self.weights


@dataclass(frozen=True)
class HeadLogits:
    """Logits that are the product of hidden states and a head.

    Attributes:
        head: The head. The caller applies its scale and cap to what `write` computes.
        operands: The factors: tensors, `Rows` for a quantized weight, None for no bias.
    """

    head: Head
    operands: Operands[Any]

    @classmethod
    def from_hidden(cls, head: Head, hidden: torch.Tensor) -> "HeadLogits":
        """Collects the factors; runs `down` of each LoRA adapter on the hidden states.

        Args:
            head: The head.
            hidden: Shape (tokens, hidden).
        """
        hidden, *low = head.inputs(hidden)
        lora = zip(low, (adapter.up for adapter in head.lora), strict=True)
        return cls(head, Operands(hidden, head.weight, head.bias, tuple(lora)))

    @property
    def inputs(self) -> Tensors:
        """The factors with a row per token, each of shape (tokens, width)."""
        return self.operands.inputs

    @property
    def factors(self) -> tuple[torch.Tensor | Rows, ...]:
        """All operands of the products: `inputs`, then the weights."""
        return *self.inputs, *self.operands.weights

    def weight_rows(self, rows: Any) -> list[torch.Tensor]:
        """These rows of each weight, see `lm_head.rows_of`; each (rows, width)."""
        pairs = zip(self.operands.weights, self.inputs, strict=True)
        return [rows_of(weight, rows, x) for weight, x in pairs]

    def write(
        self,
        weights: list[torch.Tensor],
        chunk: slice,
        tile: slice,
        out: torch.Tensor,
    ) -> None:
        """Computes logits before scale and cap.

        Args:
            weights: `weight_rows(tile)`.
            chunk: The tokens.
            tile: The words.
            out: Shape (chunk, tile), float32; overwritten with the logits.
        """
        hidden, *low = self.inputs
        weight, *ups = weights
        lm_head.product(hidden[chunk], weight.T, out)
        for x, up in zip(low, ups, strict=True):
            lm_head.add_product(x[chunk], up.T, out)
        if self.operands.bias is not None:
            out += self.operands.bias[tile]


@dataclass(frozen=True)
class ReadyLogits:
    """Logits that a model has computed.

    Attributes:
        values: Shape (tokens, vocab).
    """

    values: torch.Tensor

    @property
    def head(self) -> Head:
        """A head without scale and cap: the model has applied both."""
        return Head(self.values.T)

    @property
    def inputs(self) -> Tensors:
        """Empty: there is no product."""
        return ()

    @property
    def factors(self) -> Tensors:
        """Empty: there is no product."""
        return ()

    def weight_rows(self, rows: Any) -> list[torch.Tensor]:
        """Empty: there are no weights."""
        return []

    def write(
        self,
        weights: list[torch.Tensor],
        chunk: slice,
        tile: slice,
        out: torch.Tensor,
    ) -> None:
        """Copies the logits of a chunk and a tile into `out`, which is float32."""
        out.copy_(self.values[chunk, tile])


Logits = HeadLogits | ReadyLogits
