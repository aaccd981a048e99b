"""What makes the host wait for the device, counted on a GPU that is not there.

`FakeTensorMode` gives tensors a device without one: they have shapes and no numbers.
Whoever asks for a number (`.item()`, `nonzero()`, a mask as index) gets an error. The
head op, which is kernels of its own there, is left out, and so is the backward, which
torch runs on real devices only.
"""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from helpers import tiny
from helpers.gpu import needs_named_gpu
from helpers.tiny import LORA
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_edpo.data.layout import each_tensor
from axolotl_edpo.ops.token_stats import TokenStats
from axolotl_edpo.training import scoring, step_counts

CUDA = torch.device("cuda:0")


pytestmark = needs_named_gpu


class Copies(TorchDispatchMode):
    """Counts copies between host and device, by direction and whether they block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [value for value in args if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in inputs if tensor.ndim}
        if func is torch.ops.aten._to_copy.default and inputs[0].device != out.device:
            waits = not (kwargs or {}).get("non_blocking")
            way = f"{inputs[0].device.type} to {out.device.type}"
            self.seen[f"{way}, {'blocking' if waits else 'not blocking'}"] += 1
        elif func is torch.ops.aten.copy_.default and len(devices) == 2:
            self.seen["copy_ between devices"] += 1
        elif func is torch.ops.aten.index.Tensor:
            index = [i for i in args[1] if i is not None]
            if any(i.device.type == "cpu" or i.dtype == torch.bool for i in index):
                self.seen["index of the host's, or a mask"] += 1
        return out


def stats(
    policy, reference, head, reference_head, y, epsilon, sum_sq_probs
) -> TokenStats:
    """Of the shapes of the head op, from the hidden states."""
    value = (policy - reference).sum(dim=1).float()
    fields = {name: value for name in TokenStats._fields}
    return TokenStats(**{**fields, "is_top1": value > 0})


def put_on(mode: FakeTensorMode, model: torch.nn.Module) -> None:
    """Gives a model weights on the device that is not there."""
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, own in values.items():
                if own is None:
                    continue
                with mode:
                    fake = torch.empty(own.shape, dtype=own.dtype, device=CUDA)
                trains = own.requires_grad
                is_weight = values is module._parameters
                values[name] = torch.nn.Parameter(fake, trains) if is_weight else fake


@pytest.fixture
def step(recipe, tmp_path, monkeypatch):
    """Walks through the micro-batches of an optimizer step; returns what was counted.

    That is the copies of each micro-batch, the sums over ranks, which are read by the
    host, and how many tensors were pinned when rows were laid.
    """

    def walk(**keys) -> tuple[list[Counter], list[tuple[int, ...]], int]:
        trainer = tiny.build(tmp_path, recipe(**keys))
        trainer.state.max_steps = 1
        trainer.prepare(trainer.model)
        source = iter(trainer.get_train_dataloader())
        mode, counted, summed, pins = FakeTensorMode(), [], [], []

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            pins.append(tensor.shape)
            return tensor

        with monkeypatch.context() as patched:
            patched.setattr(trainer.batcher, "device", CUDA)
            patched.setattr(torch.cuda, "device", lambda _: nullcontext())
            patched.setattr(torch.Tensor, "pin_memory", pin)
            batches, held = trainer.get_batch_samples(source, 2, torch.device("cpu"))

        def summed_up(accelerator, values: torch.Tensor) -> torch.Tensor:
            summed.append(tuple(values.shape))
            with unset_fake_temporarily():
                return torch.zeros(values.shape, dtype=values.dtype)

        monkeypatch.setattr(step_counts, "count_over_ranks", summed_up)
        monkeypatch.setattr(scoring, "token_stats", stats)
        monkeypatch.setattr(type(trainer.args), "device", CUDA)
        trainer.batcher.device = CUDA
        trainer.records.begin(1, removes=False)  # the first step waits once
        trainer.model.train()
        for model in filter(None, (trainer.model, trainer.ref_model)):
            put_on(mode, model)
        held = mode.from_tensor(held)
        with mode:
            held = held.to(CUDA)
        for last, batch in enumerate(batches):
            batch = each_tensor(batch, mode.from_tensor)
            trainer.accelerator.gradient_state._set_sync_gradients(bool(last))
            with mode, Copies() as copies:
                inputs = trainer._prepare_inputs(batch)
                loss = trainer.compute_loss(
                    trainer.model, inputs, num_items_in_batch=held
                )
            assert loss.device == CUDA and loss.requires_grad
            counted.append(copies.seen)
        return counted, summed, len(pins)

    return walk


ROWS = {"padded": {}, "packed": {"sample_packing": True}}


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("rows", ROWS)
def test_a_micro_batch_makes_the_host_wait_for_nothing(step, rows, adapter):
    counted, summed, pins = step(**ROWS[rows], **adapter)
    tensors = {"padded": 6, "packed": 7}[rows]
    assert pins == 2 * tensors  # else a copy that does not block waits all the same
    assert counted == [{"cpu to cuda, not blocking": tensors}] * 2
    # pairs that are not finite, and those of each step: once per optimizer step
    assert summed == [(4,)]


def test_what_would_wait_is_counted():
    with FakeTensorMode(), Copies() as copies:
        host, device = torch.zeros(3), torch.empty(3, device=CUDA)
        host.to(CUDA)
        host.to(CUDA, non_blocking=True)
        device.cpu()
        device.index_select(0, torch.zeros(2, dtype=torch.int64).to(CUDA))
        device.copy_(host)
        device[torch.tensor([0, 2])]
        device[[0, 2]]
        with pytest.raises(DataDependentOutputException):
            device.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            device.nonzero()
    assert copies.seen == {
        "cpu to cuda, blocking": 3,  # a list too
        "cpu to cuda, not blocking": 1,
        "cuda to cpu, blocking": 1,
        "copy_ between devices": 1,
        "index of the host's, or a mask": 1,
    }
