"""Fixtures of all tests: a tiny model, pairs and a recipe; no hub and no GPU."""

import gc
import os
from pathlib import Path

from helpers import surroundings

os.environ.update(surroundings.variables())

import pytest
import torch
from helpers import time_limits

if not torch.cuda.is_available():  # Triton reads the variable when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

# The folders of tests, those first whose files take long: two processes end together.
ORDER = ["engines", "runs", "unit/ops", "matrix", "project", "unit"]


def pytest_configure(config):
    """Adds to pytest-timeout the stacks of all processes."""
    config.pluginmanager.register(time_limits)


def pytest_unconfigure(config):
    """The process that started the others removes what they shared."""
    surroundings.leave()


def pytest_collection_modifyitems(items):
    """Puts the files that take long first."""
    tests = Path(__file__).parent

    def place(item) -> int:
        path = item.path.relative_to(tests)
        return next((i for i, f in enumerate(ORDER) if path.is_relative_to(f)), 0)

    items.sort(key=place)


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
def nothing_is_left_to_the_next_test():
    """Sets the number of threads; puts the environment back.

    Recipes set variables, and later runs obey them: after one with `torch_compile`,
    accelerate would compile every model of the process.
    """
    torch.set_num_threads(1)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Paths of a model, of 40 training and 10 evaluation pairs, of prepared data."""
    from helpers import tiny

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
    from helpers import tiny

    def make(**keys):
        keys = {"dataset_prepared_path": str(parts["prepared"]), **keys}
        return tiny.recipe(tmp_path, parts["model"], parts["pairs"], **keys)

    return make
