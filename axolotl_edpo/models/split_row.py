"""A packed row of which each rank of a group has a part (context parallelism).

Only attention lets a token see others. So each rank runs the layers on its part, and
around attention the ranks exchange heads for tokens (Ulysses, arXiv 2309.14509):

    queries, keys, values   a part of the tokens, all heads
      all-to-all          → all tokens, a share of the heads
      attention             of the whole row, see `packed_attention.py`
      all-to-all          → a part of the tokens, all heads

Behind the head, `gather_tokens` and `gather_stats` make values per token whole again.
They are few numbers per token. Each rank then sums them over answers in the order of
the row, as one process does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ..data.layout import Batch, model_inputs
from ..data.segments import Segments
from ..distributed import RowGroup
from ..ops.token_stats import TokenStats

# Keywords of attention functions that hold a value per head.
PER_HEAD = ("s_aux", "position_bias")


class SplitRow:
    """Takes the place of `Segments` where a rank has a part of the row.

    It is no data class, because FSDP2 gives every layer a copy of those.

    Args:
        segments: Those of the whole row.
        group: The ranks that have its parts.
    """

    def __init__(self, segments: Segments, group: RowGroup):
        self.segments, self.group = segments, group

    def attend(
        self,
        attend: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        """Computes the attention of this rank's part.

        Args:
            attend: Computes the attention of a whole row, for some of the heads.
            module: The attention layer.
            query: Shape (1, heads, part of the tokens, size).
            key: The same with fewer heads, or as many.
            value: The same with the heads of `key` and any size.
            **keywords: Those of the layer.

        Returns:
            Shape (1, part of the tokens, heads, size of a value); and None.

        Raises:
            ValueError: If the heads cannot be divided among the ranks.
        """
        if any(keywords.get(name) is not None for name in PER_HEAD):
            raise ValueError("its attention has a value per head")
        times = head_copies(query.shape[1], key.shape[1], self.group.size)
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        query, key, value = self._all_tokens(query, key, value)
        with _queries_per_key(module, query.shape[1] // key.shape[1]):
            row = module, query, key, value, self.segments
            output, _ = attend(*row, **keywords)
        return self._all_heads(output), None

    def _all_tokens(self, *states: torch.Tensor) -> list[torch.Tensor]:
        """From a part of the tokens and all heads to all tokens and a share of heads.

        Args:
            *states: Shape (1, heads, part of the tokens, size); sizes may differ.
        """
        shares = [x[0].unflatten(0, (self.group.size, -1)) for x in states]
        sent = torch.cat([x.transpose(1, 2).flatten(2) for x in shares], dim=2)
        row = _AllToAll.apply(sent, self.group.group).flatten(0, 1)
        widths = [x.shape[1] * x.shape[3] for x in shares]
        return [
            features.unflatten(1, (x.shape[1], -1)).transpose(0, 1)[None].to(x.dtype)
            for features, x in zip(row.split(widths, dim=1), shares, strict=True)
        ]

    def _all_heads(self, output: torch.Tensor) -> torch.Tensor:
        """From all tokens and a share of the heads to a part of them and all heads.

        Args:
            output: Shape (1, tokens, share of the heads, size).
        """
        parts = output[0].unflatten(0, (self.group.size, -1))
        heads = _AllToAll.apply(parts, self.group.group)
        return heads.transpose(0, 1).flatten(1, 2)[None]


def row_inputs(batch: Batch, group: RowGroup) -> dict[str, Any]:
    """The arguments of a model's forward, see `model_inputs`.

    Args:
        batch: A batch, of which this rank has a part if the group has several ranks.
        group: The ranks that have its parts.
    """
    inputs = model_inputs(batch)
    if group.size > 1:
        inputs["segments"] = SplitRow(inputs["segments"], group)
    return inputs


def head_copies(heads: int, key_heads: int, ranks: int) -> int:
    """How often each key head is repeated, so that ranks can share heads evenly.

    Args:
        heads: Number of query heads.
        key_heads: Number of key heads; it divides `heads`.
        ranks: Number of ranks.

    Raises:
        ValueError: If `ranks` does not divide `heads`.
    """
    if heads % ranks:
        raise ValueError(f"{heads} attention heads cannot be shared by {ranks} ranks")
    return math.lcm(key_heads, ranks) // key_heads


@contextmanager
def _queries_per_key(module: nn.Module, count: int) -> Iterator[None]:
    """Within it, a layer has so many query heads per key head.

    The attention functions of transformers read it from the layer.
    """
    given = getattr(module, "num_key_value_groups", None)
    if given is None or given == count:
        yield
        return
    module.num_key_value_groups = count  # type: ignore[assignment]
    try:
        yield
    finally:
        module.num_key_value_groups = given


class _AllToAll(torch.autograd.Function):
    """Sends the i-th slice to rank i; slice i of the result comes from rank i."""

    @staticmethod
    def forward(ctx, slices: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(slices, group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _all_to_all(gradient, ctx.group), None


def _all_to_all(slices: torch.Tensor, group: Any) -> torch.Tensor:
    slices = slices.contiguous()
    received = torch.empty_like(slices)
    dist.all_to_all_single(received, slices, group=group)
    return received


# --- values per token ----------------------------------------------------------------


def gather_tokens(values: torch.Tensor, batch: Batch, group: RowGroup) -> torch.Tensor:
    """The values of all scored tokens of a row, from those of its parts; no gradient.

    Args:
        values: Shape (tokens of this rank's part, ...).
        batch: The batch.
        group: The ranks that have the parts.

    Returns:
        Shape (tokens, ...), in the order of the row's `lengths`.
    """
    if group.size == 1 or not sum(batch["part_sizes"]):
        return values
    sizes, values = batch["part_sizes"], values.detach()
    # a collective takes tensors of one shape, so shorter ones are padded
    own = values.new_zeros(max(sizes), *values.shape[1:])
    own[: len(values)] = values
    every = own.new_empty(group.size * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(every, own, group=group.group)
    parts = zip(every.split(len(own)), sizes, strict=True)
    whole = torch.cat([part[:size] for part, size in parts])
    return torch.empty_like(whole).index_copy_(0, batch["places"], whole)


def own_places(batch: Batch, group: RowGroup) -> torch.Tensor:
    """Index, among the scored tokens of the row, of each token of this rank's part."""
    return batch["places"].split(batch["part_sizes"])[group.rank]


def gather_stats(stats: TokenStats, batch: Batch, group: RowGroup) -> TokenStats:
    """The statistics of all scored tokens of a row, from those of its parts.

    All ranks of the group compute the same loss of them. Each rank's backward gives the
    part of the gradient that goes through its own tokens. The engine averages over all
    ranks, but the loss is a mean over row groups. So gradients are multiplied by the
    size of the group.

    Args:
        stats: Those of this rank's part; only `policy_logp` has a gradient.
        batch: The batch.
        group: The ranks that have the parts.
    """
    if group.size == 1 or not sum(batch["part_sizes"]):
        return stats
    whole = gather_tokens(torch.stack([*stats], dim=1), batch, group).unbind(1)
    own = _ScaledGradient.apply(stats.policy_logp, group.size)
    logp = whole[0].index_copy(0, own_places(batch, group), own)
    return TokenStats(logp, *whole[1:])


class _ScaledGradient(torch.autograd.Function):
    """Returns its input; the gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient * ctx.factor, None
