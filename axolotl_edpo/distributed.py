"""What DDP, DeepSpeed and FSDP2 ask of the walk from batch to loss.

They gather weights, and prepare gradients, in the forward of the module that they
wrap. So everything that reads a weight runs inside such a forward:

    `inside_forward`   of the whole model; the layers' own forwards do the rest
    `inside`           of single modules, for whoever reads their weights itself

Before the first step a reference of its own is sharded as the policy is: `shard`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import accelerate.accelerator
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from trl.models.utils import _ForwardRedirection

_redirect = _ForwardRedirection()


def inside_forward(
    accelerator: Accelerator, model: nn.Module, method: Callable[[nn.Module], Any]
) -> Any:
    """Runs a function in the forward of the engine that wraps a model.

    Args:
        accelerator: That prepared the model.
        model: As its engine wraps it.
        method: Is given the model without its engine.

    Returns:
        What the function returns.
    """
    unwrapped = accelerator.unwrap_model(model)
    with accelerator.autocast():
        # engines cast, move or copy arguments: None is left alone
        return _redirect(model, unwrapped, lambda _: method(unwrapped), None)


def inside(
    modules: Sequence[nn.Module],
    method: Callable[[torch.Tensor], Any],
    hidden: torch.Tensor,
) -> Any:
    """Runs a function in the forward of all these modules.

    Args:
        modules: Whose weights it reads.
        method: Is given the hidden states.
        hidden: With gradient, if the weights are needed in the backward: ZeRO-3 lets go
            of them where the gradient of a module's input is known.

    Returns:
        What the function returns.
    """
    if not modules:
        return method(hidden)
    first, *others = modules
    return _redirect(first, first, lambda own: inside(others, method, own), hidden)


def keep_float32(accelerator: Accelerator) -> None:
    """Leaves what a model's forward returns as it is, under FSDP2 in mixed precision.

    It would be rounded to the dtype of the weights, and the head's statistics with it.
    Layers return that dtype all the same, as their weights have it.
    """
    plugin = accelerator.state.fsdp_plugin
    if (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def shard(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """Shards a frozen model layer by layer, as FSDP2 does with the policy.

    TRL would shard it as one piece, of which every rank holds the whole in its forward.
    """
    # axolotl replaces it there: ranks that loaded no weights get those of rank 0
    return accelerate.accelerator.fsdp2_prepare_model(accelerator, reference)


def reshard(model: nn.Module) -> None:
    """Lets go of weights that FSDP2 keeps whole after a forward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def let_go(model: nn.Module, kept: Sequence[torch.Tensor]) -> None:
    """Frees what ZeRO-3 has sharded of a model that will not run again.

    DeepSpeed holds every module that ever ran: `functools.lru_cache` on a method of its
    coordinator has them as keys.

    Args:
        model: Without its engine.
        kept: Weights of it that are still read.
    """
    for weight in model.parameters():
        if hasattr(weight, "ds_id") and not any(weight is other for other in kept):
            for name in ("ds_tensor", "ds_secondary_tensor"):
                if getattr(weight, name, None) is not None:
                    delattr(weight, name)
            weight.data = weight.new_empty(0)


@contextmanager
def gathered(
    tensors: Sequence[torch.Tensor], writes: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Within it, the whole of tensors that ZeRO-3 or FSDP2 have sharded.

    Args:
        tensors: Weights outside their module's forward, sharded or not.
        writes: Whether what the first rank writes into them is kept; ZeRO-3 only.
    """
    empty = [tensor for tensor in tensors if _is_released(tensor)]
    if not empty:
        yield [_whole(tensor) for tensor in tensors]
        return
    import deepspeed

    with ExitStack() as gathering:
        writer = 0 if writes else None
        # one by one: of several, DeepSpeed waits for the last, and gloo may not be done
        for tensor in empty:
            gathering.enter_context(
                deepspeed.zero.GatheredParameters([tensor], modifier_rank=writer)
            )
        yield list(tensors)


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Fills a weight, sharded or not, with a whole value that every rank has."""
    released = [tensor]
    if isinstance(tensor, DTensor):
        mesh: Any = tensor.device_mesh
        here = value.to(mesh.device_type)
        value = distribute_tensor(here, mesh, tensor.placements, src_data_rank=None)
        released = []
    with torch.no_grad(), gathered(released, writes=True):
        tensor.copy_(value)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 or FSDP2 have divided a weight among the ranks."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def of_first(value: Any) -> Any:
    """The first rank's, on every rank."""
    return broadcast_object_list([value], from_process=0)[0]


def _is_released(tensor: Any) -> bool:
    """Whether ZeRO-3 has taken a weight away until its module's forward."""
    return hasattr(tensor, "ds_id") and tensor.ds_status.name != "AVAILABLE"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    here: Any = tensor.to(tensor.device_mesh.device_type)
    return here.full_tensor()
