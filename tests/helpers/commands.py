"""axolotl's commands: as installed, or in a process that has imported everything."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import psutil
from torch.multiprocessing import ProcessExitedException

from helpers import processes
from helpers.paths import ROOT

Done = subprocess.CompletedProcess[str]
# Seconds, less than a test may take, so that this limit strikes first.
LIMIT = 240.0


def environment() -> dict[str, str]:
    """Ours, with this Python's commands and the tests' plugins in reach."""
    values = dict(os.environ)
    first = {
        "PATH": [Path(sys.executable).parent],
        "PYTHONPATH": [ROOT, ROOT / "tests"],
    }
    for name, folders in first.items():
        rest = filter(None, [os.environ.get(name)])
        values[name] = os.pathsep.join([*map(str, folders), *rest])
    return values


def installed(folder: Path, *words: str, stdin: str = "") -> Done:
    """Runs the installed `axolotl`, as a user does.

    Args:
        folder: The working directory.
        *words: What follows `axolotl` on the command line.
        stdin: What is typed.

    Returns:
        The process; its `stdout` holds what it printed, errors too.

    Raises:
        TimeoutError: If it hangs; the message holds what it printed, and its stacks.
    """
    process = subprocess.Popen(
        ["axolotl", *words],
        cwd=folder,
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        printed, _ = process.communicate(stdin, timeout=LIMIT)
    except subprocess.TimeoutExpired as late:
        started = psutil.Process(process.pid).children(recursive=True)
        processes.abort([*(child.pid for child in started), process.pid])
        raise TimeoutError(process.communicate()[0]) from late
    return Done(process.args, process.returncode, printed)


def forked(folder: Path, *words: str, stdin: str = "") -> Done:
    """As `installed`, from where the imports are done: what `axolotl` calls."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stdin").write_text(stdin)
    code, printed = 0, folder / "stdout"
    try:
        processes.run(_axolotl, folder, words, seconds=LIMIT)
    except ProcessExitedException as ended:
        code = ended.exit_code
    except TimeoutError as late:
        raise TimeoutError(printed.read_text()) from late
    return Done(["axolotl", *words], code, printed.read_text())


def _axolotl(number: int, folder: Path, words: tuple[str, ...]) -> None:
    """The command in this process; it ends with the command's exit code."""
    from axolotl.cli.main import cli

    for path, mode, standard in (("stdin", "r", [0]), ("stdout", "w", [1, 2])):
        with (folder / path).open(mode) as file:
            for descriptor in standard:
                os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, closefd=False)
    os.chdir(folder)
    try:
        cli([*words], prog_name="axolotl")
    except SystemExit as ended:
        sys.exit(ended.code)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def imports_of(*words: str) -> tuple[str, set[str]]:
    """What a Python process prints, and the names of all that it imports.

    Args:
        *words: What follows `python`.
    """
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    return done.stdout, {line.rpartition("|")[2].strip() for line in lines}
