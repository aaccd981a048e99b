"""Processes that start in milliseconds, and none of which runs for ever.

A server imports axolotl, DeepSpeed and TRL once. Processes are forked from it. Each has
a time limit: one that is still there is aborted, and Python's faulthandler writes the
stacks of its threads into a file before it ends.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp

from helpers import surroundings

# What the server imports: commands, engines, what a run imports when it begins.
PRELOAD = [
    "axolotl.cli.main",
    "axolotl.core.builders",
    "axolotl.loaders.model",
    "axolotl.train",
    "axolotl_edpo.trainer",
    "bitsandbytes.nn",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage3",
    "setuptools",
    "torch.distributed.fsdp",
    "torch.profiler",
    "trackio",
    "transformers.models.llama.modeling_llama",
    "helpers.ranks",
]
multiprocessing.set_forkserver_preload(PRELOAD)

# Seconds; ten times what the longest run of ranks takes on an idle machine.
LIMIT = 180.0
# Seconds in which an aborted process writes its stacks.
WRITING = 2.0

_reserved: list[socket.socket] = []


def start(function: Callable, *arguments, count: int = 1) -> mp.ProcessContext:
    """Starts processes and does not wait for them.

    Args:
        function: Called in each with its number and the arguments.
        *arguments: Can be pickled.
        count: How many processes.
    """
    return mp.start_processes(
        _enter,
        (dict(os.environ), function, arguments),
        nprocs=count,
        join=False,
        start_method="forkserver",
    )


def wait(context: mp.ProcessContext, seconds: float = LIMIT) -> None:
    """Waits for processes.

    Raises:
        ProcessRaisedException: If one raised; it holds the traceback.
        ProcessExitedException: If one was killed.
        TimeoutError: If one was still there after so many seconds; all are aborted, and
            it holds their stacks.
    """
    until = time.monotonic() + seconds
    while not context.join(max(until - time.monotonic(), 0.0)):
        if time.monotonic() >= until:
            stacks = abort(context.pids())
            raise TimeoutError(f"aborted after {seconds:g} s:\n{stacks}")


def ended(context: mp.ProcessContext, seconds: float = LIMIT) -> list[tuple[int, str]]:
    """Waits until each process ends by itself; aborts those that are there for longer.

    Returns:
        Exit code and error of each process. The error is "" if the process succeeded,
        and its traceback if it raised. Of a process that ended in another way, it is
        the stacks that were written as it was aborted or crashed, and a last line that
        says how it ended.
    """
    until = time.monotonic() + seconds
    for process in context.processes:
        process.join(max(until - time.monotonic(), 0))
        if process.is_alive():
            abort([process.pid])
        process.join()
    pairs = zip(context.processes, map(Path, context.error_files), strict=True)
    return [(process.exitcode, _error(process, file)) for process, file in pairs]


def _error(process: Any, file: Path) -> str:
    """The error of a process that has ended, as `ended` returns it.

    Args:
        process: The process.
        file: Where PyTorch has pickled its traceback, if it raised.
    """
    if file.exists():
        return pickle.loads(file.read_bytes())
    if not process.exitcode:
        return ""
    stacks = _stacks_file(process.pid)
    written = stacks.read_text() if stacks.exists() else ""
    how = f"exit code {process.exitcode}"
    if process.exitcode < 0:
        how = signal.Signals(-process.exitcode).name
    return f"{written}ended without an exception: {how}"


def run(function: Callable, *arguments, count: int = 1, seconds: float = LIMIT) -> None:
    """Starts processes and waits for them, as `start` and `wait` say."""
    wait(start(function, *arguments, count=count), seconds)


def abort(pids: Iterable[int]) -> str:
    """Ends processes.

    Returns:
        The stacks of those that were forked; others of Python write them to stderr.
    """
    pids, processes = [*pids], []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
            processes[-1].send_signal(signal.SIGABRT)
    until = time.monotonic() + WRITING
    while any(map(_runs, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    for process in filter(_runs, processes):
        process.kill()
    written = [path for path in map(_stacks_file, pids) if path.exists()]
    return "\n".join(path.read_text() for path in written)


def _runs(process: psutil.Process) -> bool:
    """Whether it does; who started it may not have asked for its exit code yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _stacks_file(pid: int) -> Path:
    """Where a forked process writes its stacks when it is aborted."""
    return surroundings.folder() / f"stacks-{pid}"


def free_port() -> int:
    """A port of this machine that no other process is given while this one lives.

    A bound socket that does not listen reserves it; whoever listens with SO_REUSEADDR,
    as PyTorch's store does, may.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    return reserved.getsockname()[1]


def _enter(number: int, environment: dict, function: Callable, arguments) -> None:
    """Gives a process the environment of the test that starts it."""
    # the server's garbage stays: destructors may wait for threads that a fork lacks
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable(_stacks_file(os.getpid()).open("w"))
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of data loaders; the server set its own
    function(number, *arguments)
