"""Stops a run whose numbers are not finite, before they reach weights or checkpoints.

    what is checked   when
    weights           before the first step: the saved model may hold NaN
    losses of pairs   before the last backward of each optimizer step
    gradients         before the optimizer uses them. Under DeepSpeed, whose optimizer
                      runs within the backward: before the step is counted and saved

A gradient that overflows under fp16 is no error: the optimizer skips its step, and the
loss scale is lowered.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from ..distributed import local_part, sum_over_ranks
from ..run_files import last_complete


class Diverged(FloatingPointError):
    """Training was stopped, because a loss, margin or gradient is not finite."""


class FiniteCheck:
    """Counts losses that are not finite, on the device, and stops the run.

    Args:
        output_dir: The run's output folder. The error names its last complete
            checkpoint.
    """

    def __init__(self, output_dir: Path):
        self._output_dir = output_dir
        self._broken: torch.Tensor | None = None

    def observe(self, losses: torch.Tensor) -> None:
        """Counts losses, shape (pairs,); does not wait for the device."""
        broken = (~losses.detach().isfinite()).sum()
        self._broken = broken if self._broken is None else self._broken + broken

    def take(self) -> torch.Tensor:
        """Returns the count since the last call, shape (), int64, and resets it."""
        broken, self._broken = self._broken, None
        return torch.zeros((), dtype=torch.int64) if broken is None else broken

    def stop(self, what: str, step: int, beta: float) -> NoReturn:
        """Stops the run with an error.

        Args:
            what: Subject and verb of the message, such as "the gradient is".
            step: The optimizer step, counted from 1.
            beta: The KL penalty of that step.

        Raises:
            Diverged: Always.
        """
        last = last_complete(self._output_dir)
        checkpoint = (
            f"the last complete checkpoint is {last}"
            if last
            else "there is no checkpoint"
        )
        raise Diverged(
            f"{what} not finite in step {step} (β = {beta:.6g}): training stops, "
            f"{checkpoint}. Lower `learning_rate`, set `max_grad_norm`, or look at the "
            "pairs of that step"
        )


def gradient_is_broken(
    accelerator: Accelerator,
    model: nn.Module,
    norm: torch.Tensor | float | None,
    deepspeed: bool,
) -> bool:
    """Whether a gradient is not finite; all ranks call it and get the same result.

    DeepSpeed's optimizer has already run when this is called. Up to 0.18 it applies
    such a gradient, so the weights are checked for NaN. From 0.19 on it skips the
    step, and the norm is not finite.

    Args:
        accelerator: The run's accelerator.
        model: The model, wrapped by its engine.
        norm: The norm of the gradient; None if the engine does not return it.
        deepspeed: Whether DeepSpeed is the engine.
    """
    if deepspeed and _weights_hold_nan(accelerator, model):
        return True
    fp16 = accelerator.scaler or accelerator.mixed_precision == "fp16"
    return not fp16 and norm is not None and not_finite(norm)


def _weights_hold_nan(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether a trainable weight holds NaN, on any rank."""
    weights = accelerator.unwrap_model(model).parameters()
    trained = [weight for weight in weights if weight.requires_grad]
    flags = nan_flags(trained, accelerator.device)
    return int(sum_over_ranks(accelerator, flags.sum())) > 0


def refuse_broken_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuses a model whose weights hold NaN; all ranks call it.

    Args:
        accelerator: The run's accelerator.
        model: The model, wrapped by its engine.

    Raises:
        ValueError: Names the first weight that holds NaN.
    """
    policy = accelerator.unwrap_model(model)
    names, weights = zip(*policy.named_parameters(), strict=True)
    flags = sum_over_ranks(accelerator, nan_flags(weights, accelerator.device))
    broken = flags.nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"`base_model` or checkpoint: {len(broken)} of {len(names)} weights "
            f"hold NaN before the first step, the first is {names[broken[0]]}: "
            "use another"
        )


def require_trainable(model: nn.Module) -> None:
    """Refuses a model without trainable weights.

    Raises:
        ValueError: Names the keys that decide which weights train.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no weight of the model trains: give each of `unfrozen_parameters` from "
            "the start of its name, as in `model.layers.1.`, or set `adapter`"
        )


def not_finite(values: torch.Tensor | float) -> bool:
    """Whether a scalar is NaN or infinite; all ranks call it, as it may be sharded."""
    if isinstance(values, DTensor):
        values = values.full_tensor()
    return not torch.isfinite(torch.as_tensor(values)).item()


def nan_flags(parameters: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Which parameters hold NaN in this rank's part of them.

    Args:
        parameters: Whole or sharded. Quantized ones are not checked: their flag is 0.
        device: The device of the result.

    Returns:
        Shape (parameters,), int64, 0 or 1.
    """
    sums = [_floats(parameter).sum() for parameter in parameters]  # a sum keeps NaN
    return torch.stack([s.isnan().to(device, torch.int64) for s in sums])


def _floats(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter; a single 0 if the parameter is quantized."""
    local = local_part(parameter)
    # NF4 may store its bits in any dtype; torchao has tensor classes of its own
    quantized = hasattr(parameter, "quant_state") or local.element_size() == 1
    if quantized or type(local) not in (torch.Tensor, nn.Parameter):
        return torch.zeros(())
    return local
