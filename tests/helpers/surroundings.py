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


def variables() -> dict[str, str]:
    """Of the environment, for this process and all that it starts.

    pytest-xdist's workers get the folder of the process that starts them.
    """
    made = os.environ.get(_FOLDER) or tempfile.mkdtemp(prefix="axolotl-edpo-tests-")
    below = {name: str(Path(made) / place) for name, place in FOLDERS.items()}
    return {**VALUES, **os.environ, **below, _FOLDER: made}


def folder() -> Path:
    """The folder of the tests, once the variables are set."""
    return Path(os.environ[_FOLDER])


def leave() -> None:
    """Removes the folder."""
    shutil.rmtree(folder(), ignore_errors=True)
