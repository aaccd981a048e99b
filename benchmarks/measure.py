"""What the benchmarks share: peak memory, the environment, RESULTS.md."""

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).parent / "RESULTS.md"


def environment(*packages: str) -> str:
    """Date, device, threads, versions and commit, in one line."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    return ", ".join([today(), device_name(), *versions, f"commit {commit()}"])


def today() -> str:
    """The date."""
    return datetime.date.today().isoformat()


def device_name() -> str:
    """The GPU, or the processor and how many threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit that is checked out, and whether the tree differs from it.

    EDPO_COMMIT names it where the sources were copied to without their .git folder.
    """

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=RESULTS.parent, capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    if given := os.environ.get("EDPO_COMMIT"):
        return given
    changed = " + changes" if git("status", "--porcelain", "../axolotl_edpo") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Most memory in use during `run` beyond what was in use before it.

    On a GPU what torch allocated; on a CPU the process's resident set, whose high-water
    mark Linux lets us reset.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(AttributeError):  # not glibc: freed memory stays ours
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def bytes_in_use() -> int:
    """What torch allocated on the GPU, or the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s*(\d+) kB", text)
    if found is None:
        raise OSError(f"this system does not report {field}")
    return int(found[1]) * 1024


def append_results(section: str, text: str, into: Path = RESULTS) -> None:
    """Adds a section to RESULTS.md, or replaces the one of that name."""
    old = into.read_text() if into.exists() else "# Benchmark results\n"
    parts = re.split(r"(?m)^(?=## )", old)
    kept = [part for part in parts if not part.startswith(f"## {section}\n")]
    new = "".join(kept).rstrip() + f"\n\n## {section}\n\n{text.strip()}\n"
    into.write_text(new)
