"""The sets of `test_datasets:`, which axolotl merges into one: names, and who is whose.

While several are prepared, each pair gets the number of its entry in the column SET.
Their names come from the entries alone, so that a run that finds prepared data knows
them.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

# The column that holds the number of a pair's entry; only with several entries.
SET = "edpo_set"
# The ending of a data file. Names of data sets may hold dots, too, as `pairs-v1.5`.
ENDING = r"\.(jsonl?|parquet|arrow|csv|txt)(\.\w+)?$"


def set_names(cfg: Any) -> tuple[str, ...]:
    """A name for each entry of `test_datasets:`; empty if there are fewer than two.

    It is the name of the file or data set without folder, owner and ending; with the
    split where several have the same name. If that is not enough, all are numbered.
    Empty as well with `dataset_exact_deduplication`: a pair of two sets is then left in
    one of them.

    Args:
        cfg: axolotl's config.
    """
    entries = cfg.test_datasets or ()
    if len(entries) < 2 or cfg.dataset_exact_deduplication:
        return ()
    names = tuple(map(_name, entries))
    splits = map(_split, entries)
    longer = [f"{name}_{split}" for name, split in zip(names, splits, strict=True)]
    counts = Counter(names)
    pairs = zip(names, longer, strict=True)
    distinct = [long if counts[name] > 1 else name for name, long in pairs]
    if len({*distinct}) < len(distinct):
        distinct = [f"{name}_{number}" for number, name in enumerate(distinct, 1)]
    return tuple(distinct)


def _name(entry: Mapping[str, Any]) -> str:
    files = entry.get("data_files") or []
    path = files[0] if len(files) == 1 else entry["path"]
    name = re.sub(ENDING, "", PurePosixPath(str(path)).name)
    return re.sub(r"[^\w.-]", "_", name)


def _split(entry: Mapping[str, Any]) -> str:
    return re.sub(r"[^\w.-]", "_", str(entry.get("split") or "all"))


def numbered(make: Any, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a `PairMaker` makes of a row, with the number of its set."""
    return {**make(row), SET: number}
