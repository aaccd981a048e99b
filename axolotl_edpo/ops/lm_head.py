"""The language-model head: a linear map to the vocabulary, read tile by tile.

    logits = cap · tanh(scale · (weight @ hidden + Σ up @ down(hidden) + bias) / cap)

The sum is over LoRA adapters on the head. A quantized weight is dequantized one tile at
a time. Products of 16-bit operands have float32 results: these are not rounded before
the logits of policy and reference are subtracted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


class Rows(Protocol):
    """A weight of shape (vocab, width) that can return some of its rows.

    A tensor fits this protocol, and so does a quantized weight, which has no gradient.
    """

    shape: Any
    dtype: torch.dtype

    def __getitem__(self, rows: Any) -> torch.Tensor: ...


class Quantized4bit:
    """A bitsandbytes 4-bit weight. Its rows are dequantized to the dtype of `state`.

    Args:
        packed: Two values per byte, any shape.
        state: Its `QuantState`. The width must be a multiple of its block size.
    """

    def __init__(self, packed: torch.Tensor, state: Any):
        from bitsandbytes import functional

        vocab, hidden = state.shape
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2)
            absmax = absmax + state.offset
        self.shape, self.dtype = torch.Size((vocab, hidden)), state.dtype
        self._packed = packed.view(torch.uint8).view(vocab, hidden // 2)
        self._absmax = absmax.float().view(vocab, hidden // state.blocksize)
        self._state, self._functional = state, functional

    def __getitem__(self, rows: Any) -> torch.Tensor:
        packed, absmax = self._packed[rows], self._absmax[rows]
        state = self._functional.QuantState(
            absmax=absmax.flatten(),
            shape=(len(packed), self.shape[1]),
            blocksize=self._state.blocksize,
            quant_type=self._state.quant_type,
            dtype=self.dtype,
        )
        return self._functional.dequantize_4bit(packed.reshape(-1, 1), state)


class Quantized8bit:
    """A bitsandbytes 8-bit weight: int8 rows, each with its own scale.

    LLM.int8 also rounds the hidden states to 8 bits. This class does not, because that
    error is larger than the difference between policy and reference.

    Args:
        values: Shape (vocab, hidden), int8.
        scales: Shape (vocab,), largest absolute value of each row.
        dtype: Of the dequantized rows.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype):
        self.shape, self.dtype = values.shape, dtype
        self._values, self._scales = values, scales.float() / 127

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return (self._values[rows] * self._scales[rows][:, None]).to(self.dtype)


class LowRank(NamedTuple):
    """One LoRA adapter on the head.

    Attributes:
        down: Function from (tokens, hidden) to (tokens, rank). It includes dropout and
            scaling.
        up: Shape (vocab, rank).
    """

    down: Callable[[torch.Tensor], torch.Tensor]
    up: torch.Tensor


@dataclass(frozen=True)
class Head:
    """A linear head, and the transform that the model applies to its logits.

    Attributes:
        weight: Shape (vocab, hidden), a tensor or quantized.
        bias: Shape (vocab,) or None.
        scale: Factor on the logits (Cohere, Granite, Falcon-H1).
        cap: Soft cap (Gemma 2), or None.
        lora: LoRA adapters on the head.
    """

    weight: torch.Tensor | Rows
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    lora: tuple[LowRank, ...] = ()

    @property
    def vocab(self) -> int:
        """Size of the vocabulary."""
        return self.weight.shape[0]

    @property
    def weights(self) -> tuple[torch.Tensor | Rows, ...]:
        """The weight, then `up` of each adapter; each of shape (vocab, width)."""
        return self.weight, *(adapter.up for adapter in self.lora)

    @property
    def tensors(self) -> Tensors:
        """Those of `weights` and `bias` that are tensors, not quantized weights."""
        every = (*self.weights, self.bias)
        return tuple(x for x in every if isinstance(x, torch.Tensor))

    def inputs(self, hidden: torch.Tensor) -> Tensors:
        """The operand for each of `weights`, each of shape (tokens, width).

        Args:
            hidden: Shape (tokens, hidden).
        """
        return hidden, *(adapter.down(hidden) for adapter in self.lora)

    def scale_and_cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Applies scale and cap to logits of any shape, in place."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary.

        Args:
            hidden: Shape (tokens, hidden).

        Returns:
            Shape (tokens, vocab), float32.
        """
        operands = self.inputs(as_autocast(hidden))
        out = torch.zeros(len(hidden), self.vocab, device=hidden.device)
        with full_precision(*operands, *self.weights):
            for x, weight in zip(operands, self.weights, strict=True):
                add_product(x, rows_of(weight, slice(None), x).T, out)
        return self.scale_and_cap(out if self.bias is None else out.add_(self.bias))

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Derivative of `scale_and_cap`.

        Args:
            logits: The output of `scale_and_cap`, any shape.

        Returns:
            The same shape, or one number if there is no cap.
        """
        if self.cap is None:
            return self.scale
        return self.scale * (1 - (logits / self.cap) ** 2)


@contextmanager
def full_precision(*operands: torch.Tensor | Rows) -> Iterator[None]:
    """Within it, neither autocast nor TF32 rounds a product.

    Autocast would round the result to 16 bits. axolotl enables TF32 on every GPU that
    has it. TF32 rounds float32 operands, so it is disabled for them. It does not change
    products of 16-bit operands.

    Args:
        *operands: Everything that is multiplied within it.
    """
    float32 = any(x.dtype == torch.float32 for x in operands)
    with (
        _without_tf32() if float32 else nullcontext(),
        torch.autocast(_device_type(operands), enabled=False),
    ):
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Within it, TF32 is off: float32 operands of a product are not rounded.

    torch has two interfaces for TF32, and they must agree while a product runs. Setting
    the older one sets both. If only the newer one was set, as by transformers'
    `tf32: true`, reading the older one raises RuntimeError.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        backends: Any = torch.backends
        switches = backends.cuda.matmul, backends.mkldnn.matmul
        modes = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, mode in zip(switches, modes, strict=True):
                switch.fp32_precision = mode
        return
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _device_type(operands: tuple[torch.Tensor | Rows, ...]) -> str:
    return next(x.device.type for x in operands if isinstance(x, torch.Tensor))


def as_autocast(hidden: torch.Tensor) -> torch.Tensor:
    """Casts hidden states to the dtype of autocast, if autocast is enabled."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def rows_of(weight: torch.Tensor | Rows, rows: Any, hidden: torch.Tensor):
    """Rows of a weight, in the dtype for a product with these hidden states.

    For 16-bit hidden states the weight is rounded to their dtype, as in the model. A
    CPU has no product of 16-bit operands with a float32 result; there the rows are then
    cast to float32.

    Args:
        weight: Shape (vocab, width).
        rows: An index of rows: a slice or a tensor.
        hidden: The operand of the product.

    Returns:
        Shape (rows, width).
    """
    narrow = hidden.dtype != torch.float32
    tile = weight[rows].to(hidden.dtype) if narrow else weight[rows]
    return tile if narrow and hidden.is_cuda else tile.float()


def _is_narrow(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the device has a product of these operands with a float32 result."""
    return a.is_cuda and a.dtype == b.dtype != torch.float32


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Writes a @ b into `out`, which is float32; a and b have any float dtypes."""
    if _is_narrow(a, b):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def add_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Adds a @ b to `out`, which is float32; a and b have any float dtypes."""
    if _is_narrow(a, b):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())
