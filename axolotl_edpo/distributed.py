"""What DDP, DeepSpeed and FSDP2 need: access to sharded weights, sums over ranks.

These engines gather weights, and prepare gradients, in the forward of the module that
they wrap. So code that uses weights has to run inside such a forward:

    `within_forward`          inside the forward of the whole model, to call its layers
    `within_modules_forward`  inside the forwards of some of its modules, to read their
                              weights directly

`shard` shards a reference that is a separate model.

Under context parallelism a `RowGroup` of ranks gets the same pairs, and each of its
ranks has a part of their row. What is counted per pair is counted once per group.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .background import on_device
from .upstream import forward_redirection, shard_fsdp2


class RowGroup(NamedTuple):
    """The ranks that divide a packed row among them (`context_parallel_size`).

    Attributes:
        size: Number of ranks; 1: every rank has rows of its own.
        rank: Place of this rank among them, which is the place of its part in the row.
        group: Their process group; None if the size is 1.
    """

    size: int = 1
    rank: int = 0
    group: Any = None


def row_group(accelerator: Accelerator) -> RowGroup:
    """The ranks that divide rows with this one."""
    config = accelerator.parallelism_config
    if config is None or config.cp_size == 1:
        return RowGroup()
    mesh = accelerator.torch_device_mesh["cp"]
    return RowGroup(mesh.size(), mesh.get_local_rank(), mesh.get_group())


def data_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """Number of row groups, and the index of this rank's group.

    Each group gets pairs of its own. Without context parallelism a group is a rank.
    The ranks of a group follow each other.
    """
    size = row_group(accelerator).size
    return accelerator.num_processes // size, accelerator.process_index // size


def within_forward(
    accelerator: Accelerator, model: nn.Module, method: Callable[[nn.Module], Any]
) -> Any:
    """Runs a function inside the forward of the engine that wraps a model.

    Args:
        accelerator: The accelerator that prepared the model.
        model: The model, wrapped by its engine.
        method: The function; its argument is the model without the engine.

    Returns:
        What the function returns.
    """
    unwrapped = accelerator.unwrap_model(model)
    with accelerator.autocast():
        # an engine may cast, move or copy arguments: None stays as it is
        redirect = forward_redirection()
        return redirect(model, unwrapped, lambda _: method(unwrapped), None)


def within_modules_forward(
    modules: Sequence[nn.Module],
    method: Callable[[torch.Tensor], Any],
    hidden: torch.Tensor,
) -> Any:
    """Runs a function inside the forward of several modules.

    Args:
        modules: The modules whose weights the function reads.
        method: The function; its argument is `hidden`.
        hidden: Hidden states, shape (tokens, hidden). They must require a gradient if
            the backward reads the weights: ZeRO-3 frees the weights of a module as
            soon as the gradient of its input is known.

    Returns:
        What the function returns.
    """
    if not modules:
        return method(hidden)
    first, *rest = modules

    def inner(states: torch.Tensor) -> Any:
        return within_modules_forward(rest, method, states)

    return forward_redirection()(first, first, inner, hidden)


def keep_float32(accelerator: Accelerator) -> None:
    """Keeps FSDP2 in mixed precision from rounding what a model's forward returns.

    The forward of the whole model returns statistics per token in float32. Its layers
    still return the dtype of their weights.
    """
    plugin = accelerator.state.fsdp_plugin
    if (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def shard(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """Shards a frozen model layer by layer, as FSDP2 shards the policy.

    TRL would shard the model as a whole. Every rank would then hold all of its weights
    during a forward.
    """
    return shard_fsdp2(accelerator, reference)


def reshard(model: nn.Module) -> None:
    """Shards again the weights that FSDP2 keeps whole after a forward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def release(model: nn.Module, kept: Sequence[torch.Tensor]) -> None:
    """Frees the weights of a model that ZeRO-3 has sharded and that will not run again.

    It is not enough to delete the model: a `functools.lru_cache` of DeepSpeed keeps
    every module that has run.

    Args:
        model: The model without its engine.
        kept: Weights of the model that are still needed.
    """
    for weight in model.parameters():
        if hasattr(weight, "ds_id") and not any(weight is keep for keep in kept):
            for name in ("ds_tensor", "ds_secondary_tensor"):
                if getattr(weight, name, None) is not None:
                    delattr(weight, name)
            weight.data = weight.new_empty(0)


@contextmanager
def gathered(
    tensors: Sequence[torch.Tensor], writes: bool = False
) -> Iterator[list[torch.Tensor]]:
    """A context in which weights that ZeRO-3 or FSDP2 have sharded are whole.

    All ranks enter it together, outside the forward of the weights' module.

    Args:
        tensors: Weights, sharded or not.
        writes: Whether to keep what rank 0 writes into the weights; ZeRO-3 only.

    Yields:
        The whole weights, in the same order.
    """
    released = [tensor for tensor in tensors if _is_released(tensor)]
    if not released:
        yield [_whole(tensor) for tensor in tensors]
        return
    import deepspeed

    writer = 0 if writes else None
    with deepspeed.zero.GatheredParameters(released, modifier_rank=writer):
        yield list(tensors)


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrites a weight, sharded or not; all ranks call it.

    Args:
        tensor: The weight.
        value: The whole value, the same on every rank.
    """
    to_gather = [tensor]
    if isinstance(tensor, DTensor):
        mesh: Any = tensor.device_mesh
        value = value.to(mesh.device_type)
        value = distribute_tensor(value, mesh, tensor.placements, src_data_rank=None)
        to_gather = []
    with torch.no_grad(), gathered(to_gather, writes=True):
        tensor.copy_(value)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 or FSDP2 have divided a weight among the ranks."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a weight, or a weight that is not sharded; detached."""
    local = getattr(tensor, "ds_tensor", tensor).detach()
    return local.to_local() if isinstance(local, DTensor) else local


def broadcast_from_rank0(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    return broadcast_object_list([value], from_process=0)[0]


def sum_over_ranks(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, on every rank.

    Args:
        accelerator: The run's accelerator.
        values: This rank's tensor, on any device. All ranks pass the same shape.

    Returns:
        A tensor of this shape, on the accelerator's device.
    """
    return accelerator.reduce(on_device(values, accelerator.device), reduction="sum")


def count_over_ranks(accelerator: Accelerator, counts: torch.Tensor) -> torch.Tensor:
    """Sums counts of pairs over all row groups, see `sum_over_ranks`.

    Args:
        accelerator: The run's accelerator.
        counts: Integers, the same on all ranks of a row group.
    """
    return sum_over_ranks(accelerator, counts) // row_group(accelerator).size


def gather_rows(
    accelerator: Accelerator, values: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Concatenates the rows of all row groups; every rank gets the result.

    Args:
        accelerator: The run's accelerator.
        values: Shape (rows, ...), on any device, the same on all ranks of a row group.
            The number of rows may differ from group to group, and be 0.

    Returns:
        A tensor of shape (rows of all groups, ...) in the order of the groups, and the
        index in it of the first row of this group. One process gets its own tensor;
        else it is on the accelerator's device.
    """
    if accelerator.num_processes == 1:
        return values, 0
    place = row_group(accelerator).rank
    values = on_device(values if place == 0 else values[:0], accelerator.device)
    counts = _gather(accelerator, torch.tensor([len(values)])).tolist()
    first = sum(counts[: accelerator.process_index - place])
    longest = max(counts)
    if longest == 0:
        return values, first
    # a collective takes tensors of one shape, so shorter ones are padded
    padding = values.new_zeros(longest - len(values), *values.shape[1:])
    padded = _gather(accelerator, torch.cat([values, padding])).split(longest)
    parts = zip(padded, counts, strict=True)
    return torch.cat([rows[:count] for rows, count in parts]), first


def _gather(accelerator: Accelerator, values: torch.Tensor) -> Any:
    return accelerator.gather(on_device(values, accelerator.device))


def _is_released(tensor: Any) -> bool:
    """Whether ZeRO-3 keeps this weight empty outside the forward of its module."""
    return hasattr(tensor, "ds_id") and tensor.ds_status.name != "AVAILABLE"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    shard: Any = tensor.to(tensor.device_mesh.device_type)
    return shard.full_tensor()
