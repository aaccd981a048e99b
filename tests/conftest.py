"""Fixtures of all tests: a tiny model, pairs and a recipe; no hub and no GPU."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():  # Triton reads the variable when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from helpers import tiny


@pytest.fixture(autouse=True, scope="session")
def imports_are_never_garbage():
    """Keeps imports out of garbage collection, which is slow with them.

    axolotl collects often, and so do the processes that it forks.
    """
    import axolotl.common.datasets
    import axolotl.core.builders
    import axolotl.train  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def what_a_test_left_is_never_garbage():
    """Keeps what hundreds of runs left out of the collections of the next run."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """With tiny matrices a second thread would only wait for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Paths of a model, of 40 training and 10 evaluation pairs, of prepared data."""
    folder = tmp_path_factory.mktemp("parts")
    return {
        "model": tiny.save_model(folder / "model"),
        "pairs": tiny.save_pairs(folder / "train.jsonl", 40),
        "eval": tiny.save_pairs(folder / "eval.jsonl", 10, seed=1),
        "prepared": folder / "prepared",
    }


@pytest.fixture
def recipe(parts, tmp_path):
    """A function that makes a recipe of `parts`.

    Its keywords are added to the recipe or replace keys of it; None removes a key.
    """

    def make(**keys):
        keys = {"dataset_prepared_path": str(parts["prepared"]), **keys}
        return tiny.recipe(tmp_path, parts["model"], parts["pairs"], **keys)

    return make
