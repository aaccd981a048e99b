"""Background threads, and copies to the GPU that the CPU does not wait for.

Each thread does one piece of work and then ends. So no thread has to be stopped when
a run ends or fails.
"""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> "Future[T]":
    """Runs a function in a new thread.

    Args:
        work: The function. It must end soon: until then Python cannot exit.
        name: The thread's name.

    Returns:
        A future of the function's result. If the function fails, the future's
        `result()` raises its error.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name=name).start()
    return future


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to pinned memory, from which a GPU can copy asynchronously.

    Args:
        tensor: A tensor on the CPU.
        device: Where it will be copied to later.

    Returns:
        The pinned copy. The tensor itself if `device` is not a GPU.
    """
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a new thread would else use the first GPU
        return tensor.pin_memory()


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to a device.

    A copy to a GPU is asynchronous. A copy to another device is complete on return:
    otherwise the CPU could overwrite the memory before the device has read it.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to a device as `copied` does; pins a tensor of the CPU first."""
    if tensor.device.type == "cpu":
        tensor = pinned(tensor, device)
    return copied(tensor, device)
