"""What the suite promises: nothing hangs, and two suites at once share nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import axolotl.train
import pytest
import torch
import torch.distributed as dist
from helpers import processes, ranks, surroundings
from helpers.commands import environment
from helpers.paths import ROOT
from helpers.surroundings import FOLDERS
from torch.distributed import TCPStore

HANGS = """
import subprocess, sys

SLEEPS = "import time\\ndef never_ends(): time.sleep(600)\\nnever_ends()"

def test_hangs():
    subprocess.run([sys.executable, "-c", SLEEPS])
"""


def test_a_test_that_hangs_fails_with_the_stacks_of_all_its_processes(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-p", "helpers.time_limits"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--timeout", "5", "test_hangs.py"],
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "test_hangs.py::test_hangs hangs, with 1 processes:" in done.stdout
    assert "in never_ends" in done.stdout and "1 failed" in done.stdout


def sleep(rank: int) -> None:
    """Ends on rank 1 only."""
    if rank == 0:
        time.sleep(600)


def test_ranks_that_hang_are_aborted_and_their_stacks_are_in_the_error():
    with pytest.raises(TimeoutError, match=r"aborted after 2 s:(.|\n)* in sleep\n"):
        processes.run(sleep, count=2, seconds=2)


def leave_gloo_at_work(train):
    """Trains; destroys the process group while gloo still has a tensor of Python."""

    def destroy() -> None:
        tensor = torch.ones(1)
        tensor.mark = True  # to free a tensor with an attribute, gloo needs the GIL
        if dist.get_rank() == 1:
            time.sleep(1)
        dist.all_reduce(tensor, async_op=True)
        dist.destroy_process_group()

    axolotl.train.cleanup_distributed = destroy
    return train(), {}


def test_ranks_end_while_gloo_is_at_work(recipe, tmp_path):
    """They hung when they freed the trainer then."""
    keys, probe = recipe(max_steps=1), f"{__name__}:leave_gloo_at_work"
    processes.wait(ranks.start(tmp_path, keys, probe=probe), 60)


def end(number: int, ways: list) -> None:
    """Ends as the list says: by a signal, by an exit code, or with an exception."""
    way = ways[number]
    if isinstance(way, signal.Signals):
        os.kill(os.getpid(), way)
    raise SystemExit(way) if isinstance(way, int) else RuntimeError(way)


def test_every_process_that_fails_says_how():
    """Also one that PyTorch has no traceback of."""
    ways = [signal.SIGKILL, signal.SIGABRT, 3, 0, "it raised"]
    killed, aborted, left, fine, raised = processes.ended(
        processes.start(end, ways, count=len(ways))
    )
    assert killed == (-signal.SIGKILL, "ended without an exception: SIGKILL")
    assert aborted[0] == -signal.SIGABRT and " in end\n" in aborted[1]
    assert aborted[1].endswith("\nended without an exception: SIGABRT")
    assert left == (3, "ended without an exception: exit code 3") and fine == (0, "")
    assert raised[0] == 1 and raised[1].endswith("RuntimeError: it raised\n")


def test_an_aborted_process_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(0.5)
    processes.abort([process.pid])
    assert process.wait(5) == -signal.SIGABRT
    processes.abort([process.pid])  # nothing is there


def test_a_port_is_kept_for_the_ranks_that_get_it():
    port = processes.free_port()
    with socket.socket() as another:
        with pytest.raises(OSError, match="in use"):
            another.bind(("127.0.0.1", port))
    store = TCPStore("127.0.0.1", port, 1, True, timeout=timedelta(seconds=5))
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_a_suite_that_a_test_starts_leaves_the_folder_of_the_tests():
    """As that of `make gpu` at toy sizes."""
    file = ROOT / "tests" / "unit" / "losses" / "test_edpo.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    done = subprocess.run([*command, "-k", "no_such"], cwd=ROOT, env=environment())
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert surroundings.folder().exists()


def test_caches_of_the_home_folder_are_those_of_this_suite():
    home = Path.home()
    for name in FOLDERS:
        assert not Path(os.environ[name]).is_relative_to(home)
