"""Tiny real parts: models, tokenizers, recipes. Nothing here needs a hub or a GPU."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def imports_are_never_garbage():
    """axolotl and its forks collect garbage often; with all imports that is slow."""
    import axolotl.common.datasets
    import axolotl.core.builders
    import axolotl.train  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: a second thread would only wait for the first."""
    torch.set_num_threads(1)
