"""Three things that each recipe repeats, in a way that is quick and the same.

`datasets` saves prepared data, however small, from a pool of processes that it spawns,
which import for seconds: here a pool of one process is this process. axolotl merges its
schema with the keys of the loaded plugins for each recipe: here once for all recipes
with the same plugins. accelerate reads in each step which packages are installed, from
files: here once.
"""

from functools import cache
from typing import Any

import axolotl.utils.config
from accelerate.utils import imports
from axolotl.integrations.base import PluginManager
from datasets import Dataset

_save = Dataset.save_to_disk
_merge = axolotl.utils.config.merge_input_args
_merged: dict[tuple[str, ...], Any] = {}


def install() -> None:
    """Replaces all three in this process."""
    imports._is_package_available = cache(imports._is_package_available)
    Dataset.save_to_disk = _save_here
    axolotl.utils.config.merge_input_args = _merge_once


def _save_here(data: Dataset, *args, num_proc: int | None = None, **keywords) -> None:
    _save(data, *args, num_proc=None if num_proc == 1 else num_proc, **keywords)


def _merge_once() -> Any:
    names = tuple(PluginManager.get_instance().get_input_args())
    if names not in _merged:
        _merged[names] = _merge()
    return _merged[names]
