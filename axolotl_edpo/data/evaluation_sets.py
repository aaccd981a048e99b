"""Names of the sets of `test_datasets:`, and the number of the set of each pair.

axolotl merges the entries of `test_datasets:` into one data set. If there are several,
each pair gets the number of its entry in the column SET while it is prepared.

The names depend on the recipe alone. So a run that finds prepared data knows them, too.
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

    A set is named after its file or data set, without folder, owner and ending. If
    several sets have the same name, their splits are added. If names are still equal,
    all are numbered.

    With `dataset_exact_deduplication` the sets have no names either: a pair that is in
    two sets is then kept in one of them only.

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
    """Makes a pair of a row, and adds the number of its set in the column SET.

    Args:
        make: The `PairMaker` of the row's entry.
        number: Number of that entry in `test_datasets:`; the first is 0.
        row: A row of the data.
    """
    return {**make(row), SET: number}
