"""`walk`: computes the logits of all tokens and words, one small matrix at a time.

    for every block of tokens        the gradients of its inputs fit into BLOCK_VALUES
        for every tile of words      a part of the vocabulary
            for every chunk          a part of the block: chunk x tile is one matrix

Forward uses it. Backward uses it too, if it computes the logits a second time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from .lm_head import Head, Rows, full_precision
from .operands import Logits

# Most values in the float32 sums of a block's input gradients: 2**25 are 128 MiB. A
# 16-bit weight gradient is rounded once per block.
BLOCK_VALUES = 2**25


@dataclass(frozen=True)
class Call:
    """Tokens, vocabulary and settings of one call of the op.

    Attributes:
        targets: The tokens y to score, shape (tokens,), int64.
        vocab: Size of the vocabulary.
        gradient_width: Values per token of the input gradients: the width of the
            hidden states plus the ranks of LoRA adapters on the head.
        epsilon: The perturbation, 0 < ε < 1, or None.
        sum_sq_probs: Whether to compute Σ p².
        tile_ops: `tile_torch` or `tile_triton`.
        with_grad: Whether gradients are enabled where the op is called. Within an
            autograd.Function they are always disabled.
    """

    targets: torch.Tensor
    vocab: int
    gradient_width: int
    epsilon: float | None
    sum_sq_probs: bool
    tile_ops: ModuleType
    with_grad: bool

    @property
    def tile_size(self) -> int:
        """Number of words in a tile. The last tile may have fewer."""
        tokens = min(self.tile_ops.CHUNK, max(1, len(self.targets)))
        return min(self.tile_ops.tile_size(tokens), self.vocab)

    def blocks(self) -> Iterator[slice]:
        """Blocks of tokens whose input gradients fit into BLOCK_VALUES."""
        size = max(1, BLOCK_VALUES // max(1, self.gradient_width))
        if size > self.tile_ops.CHUNK:
            size -= size % self.tile_ops.CHUNK
        return _slices(0, len(self.targets), size)

    def tiles(self) -> Iterator[slice]:
        """The vocabulary, tile by tile."""
        return _slices(0, self.vocab, self.tile_size)

    def index_of(self, tile: slice) -> int:
        """Index of a tile in `tiles`."""
        return tile.start // self.tile_size

    def chunks(self, block: slice) -> Iterator[slice]:
        """The tokens of a block, chunk by chunk."""
        return _slices(block.start, block.stop, self.tile_ops.CHUNK)

    def scratch(self, matrices: int) -> torch.Tensor:
        """Space for some float32 matrices: shape (matrices, chunk x tile)."""
        tokens = min(self.tile_ops.CHUNK, len(self.targets))
        return torch.empty(
            matrices, tokens * self.tile_size, device=self.targets.device
        )

    def targets_in(self, cell: "Cell") -> torch.Tensor:
        """The targets of the chunk minus the first word of the tile, shape (chunk,)."""
        return self.targets[cell.chunk] - cell.tile.start

    def add_tile(
        self,
        sums: torch.Tensor,
        cell: "Cell",
        heads: Sequence[Head],
        numerators: torch.Tensor | None,
    ) -> torch.Tensor:
        """Adds a cell to the sums of all tokens, see `tile_torch.add_tile`.

        Args:
            sums: Shape (FIELDS, tokens), changed in place.
            cell: The cell.
            heads: The heads of policy and reference, or that of the policy alone.
            numerators: See `tile_torch.add_tile`.

        Returns:
            See `tile_torch.add_tile`.
        """
        return self.tile_ops.add_tile(
            sums[:, cell.chunk],
            cell.space,
            self.targets_in(cell),
            heads,
            epsilon=self.epsilon,
            sum_sq_probs=self.sum_sq_probs,
            numerators=numerators,
        )

    @contextmanager
    def on_device(self, *factors: torch.Tensor | Rows) -> Iterator[None]:
        """Within it, kernels run on the targets' GPU, and no product is rounded.

        Args:
            *factors: Everything that is multiplied, see `full_precision`.
        """
        device = torch.cuda.device_of(self.targets)
        with device, full_precision(self.targets, *factors):
            yield


@dataclass(frozen=True)
class Cell:
    """A chunk of tokens and a tile of words, with their logits.

    Attributes:
        block: The block that the chunk is a part of.
        tile: The words.
        chunk: The tokens.
        space: Shape (matrices, chunk, tile), float32. The first matrices hold logits
            before scale and cap; the others are scratch.
        weights: The rows of the tile in each weight of the policy: (tile, width).
        is_last_tile: Whether it is the last tile of the vocabulary.
    """

    block: slice
    tile: slice
    chunk: slice
    space: torch.Tensor
    weights: list[torch.Tensor]
    is_last_tile: bool

    @property
    def opens_tile(self) -> bool:
        """Whether this is the first chunk of the block, for this tile."""
        return self.chunk.start == self.block.start

    @property
    def closes_tile(self) -> bool:
        """Whether this is the last chunk of the block, for this tile."""
        return self.chunk.stop == self.block.stop

    @property
    def opens_block(self) -> bool:
        """Whether this is the first cell of the block."""
        return self.opens_tile and self.tile.start == 0


def walk(call: Call, logits: Sequence[Logits], matrices: int) -> Iterator[Cell]:
    """Computes the logits cell by cell, see the docstring of this file.

    Args:
        call: Tokens and vocabulary.
        logits: Of the policy, or of policy and reference. They are written into the
            first matrices of `Cell.space`.
        matrices: How many matrices `Cell.space` has.

    Yields:
        Each cell. The next cell reuses its space.
    """
    scratch = call.scratch(matrices)
    for block in call.blocks():
        for tile in call.tiles():
            weights = [x.weight_rows(tile) for x in logits]
            for chunk in call.chunks(block):
                space = _matrices(scratch, chunk, tile)
                for i, x in enumerate(logits):
                    x.write(weights[i], chunk, tile, space[i])
                last = tile.stop == call.vocab
                yield Cell(block, tile, chunk, space, weights[0], last)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _matrices(scratch: torch.Tensor, chunk: slice, tile: slice) -> torch.Tensor:
    """The scratch as contiguous matrices of shape (chunk, tile)."""
    rows, columns = chunk.stop - chunk.start, tile.stop - tile.start
    return scratch[:, : rows * columns].view(-1, rows, columns)
