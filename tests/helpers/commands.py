"""axolotl's commands."""

import os
import subprocess
import sys
from pathlib import Path


def command(folder: Path, *words: str, stdin: str = ""):
    """Runs an axolotl command as a user would; all it prints is its `stdout`."""
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
