"""Stops a run whose numbers are not finite, before they reach weights or checkpoints.

    weights      before the first step: a model that was saved broken
    losses       of every pair, before the last backward of an optimizer step
    gradients    before the optimizer takes them; under DeepSpeed, whose optimizer runs
                 in the backward, before the step counts and is saved

A gradient that overflows under fp16 is no error: the optimizer's step is skipped, and
loss scaling goes on with a smaller scale.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from . import checkpointing as checkpoint


class Diverged(FloatingPointError):
    """Training made numbers that are not finite; it was stopped."""


def diverged(what: str, step: int, beta: float, output_dir: Path) -> Diverged:
    """The error that ends a run.

    Args:
        what: What is not finite.
        step: The optimizer step that it is about, from 1.
        beta: The KL penalty of that step.
        output_dir: Of the run, for its last complete checkpoint.
    """
    last = checkpoint.last_complete(output_dir)
    kept = (
        f"the last complete checkpoint is {last}" if last else "there is no checkpoint"
    )
    return Diverged(
        f"{what} not finite in step {step} (β = {beta:.6g}): training stops, {kept}. "
        "Lower `learning_rate`, set `max_grad_norm`, or look at the pairs of that step"
    )


def not_finite(values: torch.Tensor | float) -> bool:
    """Whether a number, sharded or not, is NaN or infinite; all ranks call it."""
    if isinstance(values, DTensor):
        values = values.full_tensor()
    return not torch.isfinite(torch.as_tensor(values)).item()


def nan_flags(parameters: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Which parameters hold NaN, as far as this rank has them.

    Args:
        parameters: Whole or sharded; quantized ones hold none.
        device: Of the result.

    Returns:
        Shape (parameters,), int64, 0 or 1.
    """
    sums = [_own_part(p).sum() for p in parameters]  # NaN stays NaN in a sum
    return torch.stack([s.isnan().to(device, torch.int64) for s in sums])


def _own_part(parameter: torch.Tensor) -> torch.Tensor:
    own = getattr(parameter, "ds_tensor", parameter).detach()
    own = own.to_local() if isinstance(own, DTensor) else own
    # bits of NF4 are kept in any dtype; tensors of torchao have classes of their own
    quantized = hasattr(parameter, "quant_state") or own.element_size() == 1
    if quantized or type(own) not in (torch.Tensor, nn.Parameter):
        return torch.zeros(())
    return own


def require_trainable(model: nn.Module) -> None:
    """Refuses a model of which nothing trains.

    Raises:
        ValueError: Names the keys that freeze parameters.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no weight of the model trains: give each of `unfrozen_parameters` from "
            "the start of its name, as in `model.layers.1.`, or set `adapter`"
        )
