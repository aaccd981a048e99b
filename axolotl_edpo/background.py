"""Work of the host beside the run, and copies that do not wait for the device.

A thread is made for one piece of work and ends with it: none has to be stopped when a
run ends or fails.
"""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> "Future[T]":
    """Begins some work in a thread of its own.

    Args:
        work: Ends by itself, within a step: the interpreter waits for it.
        name: Of the thread.

    Returns:
        What it returns; an error is raised where the result is asked for.
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
    """A tensor where a GPU can copy it from while the host goes on.

    Args:
        tensor: On the CPU.
        device: That it will be copied to; if it is no GPU, nothing is done.
    """
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a thread begins with the first GPU
        return tensor.pin_memory()


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; to a GPU it is copied while the host goes on.

    Other devices may read the host's memory after it is used again.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As `copied`, of a tensor that may be pageable memory of the host."""
    if tensor.device.type == "cpu":
        tensor = pinned(tensor, device)
    return copied(tensor, device)
