"""A section of `gpu.py` in a process of its own.

    python -c "import gpu_child; gpu_child.main()" MODULE:FUNCTION FILE

The function gets a `Notes`. All that it notes is in FILE at once, so that a process
that is stopped, or that a fault of CUDA ends, has left what it found before. The
process ends with the one that started it: when its standard input is closed.
"""

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
TRACEBACK_LINES = 12


class Notes:
    """What a section found, by name, in the order it was found.

    Args:
        path: Where it is written as JSON.
    """

    def __init__(self, path: Path):
        self._path = path
        self._state: dict[str, Any] = {"found": {}}

    def __call__(self, name: str, value: Any) -> None:
        """Notes a number, a text, a list of them, or a dictionary: a row of a table."""
        self._state["found"][name] = value
        print(f"  {name}: {value}", flush=True)
        self._write()

    def close(self, status: str, **more: Any) -> None:
        """How the section ended."""
        self._state |= {"status": status, **more}
        self._write()

    def _write(self) -> None:
        replace(self._path, json.dumps(self._state, indent=1, ensure_ascii=False))


def replace(path: Path, text: str) -> None:
    """Writes a file that is never there in part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def end(pid: int) -> None:
    """Ends a process and all that it started."""
    try:
        process = psutil.Process(pid)
        started = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for each in [process, *started] if pid != os.getpid() else [*started, process]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            pass


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    end(os.getpid())


def traceback_lines(count: int) -> list[str]:
    """The last lines of an error's traceback, without the folder of the project."""
    lines = traceback.format_exc().splitlines()[-count:]
    return [line.replace(f"{ROOT}{os.sep}", "") for line in lines]


def measure(function: str, notes: Notes) -> None:
    """Runs a section; an error is noted and does not leave here."""
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(notes)
    except (Exception, SystemExit) as error:
        lines = traceback_lines(TRACEBACK_LINES)
        reason = f"{type(error).__name__}: {error}"
        notes.close("failed", reason=reason, traceback=lines)
    else:
        notes.close("done")


def main() -> None:
    """Runs the section that the command line names."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function, path = sys.argv[1:]
    measure(function, Notes(Path(path)))
    sys.stdout.flush()
    os._exit(0)  # all is on disk; what libraries do at exit can take long
