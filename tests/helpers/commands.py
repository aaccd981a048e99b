"""axolotl's commands, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def command(
    folder: Path, *words: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs an axolotl command as a user does.

    Args:
        folder: The working directory.
        *words: What follows `axolotl` on the command line.
        stdin: What is typed.

    Returns:
        The process; its `stdout` holds what it printed, errors too.
    """
    scripts = str(Path(sys.executable).parent)
    return subprocess.run(
        ["axolotl", *words],
        cwd=folder,
        env={
            **os.environ,
            "PATH": scripts + os.pathsep + os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
        },
        input=stdin,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
