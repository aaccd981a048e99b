"""What tests share with nobody: caches, the network, the number of threads.

Imports nothing of PyTorch: its libraries read these variables when they are imported.
"""

import os
import shutil
import tempfile
from pathlib import Path

VALUES = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # with tiny matrices a second would wait for the first
    "PYTHONFAULTHANDLER": "1",  # an aborted process writes its stacks
}
# Where libraries keep files in the home folder, below the folder of the tests.
FOLDERS = {"HF_HOME": "huggingface", "TORCH_EXTENSIONS_DIR": "torch_extensions"}
_FOLDER = "EDPO_TESTS_FOLDER"
_is_first = False


def variables() -> dict[str, str]:
    """Of the environment, for this process and all that it starts.

    All share the folder of the first process, pytest-xdist's workers too.
    """
    global _is_first
    path = os.environ.get(_FOLDER)
    if path is None:
        path, _is_first = tempfile.mkdtemp(prefix="axolotl-edpo-tests-"), True
    below = {name: str(Path(path) / place) for name, place in FOLDERS.items()}
    return {**VALUES, **os.environ, **below, _FOLDER: path}


def folder() -> Path:
    """The folder of the tests, once the variables are set."""
    return Path(os.environ[_FOLDER])


def leave() -> None:
    """Removes the folder, in the process that made it."""
    if _is_first:
        shutil.rmtree(folder(), ignore_errors=True)
