"""The columns of a data set of pairs, read as Arrow arrays.

    from axolotl    prompt, chosen, rejected               text
    from TRL        prompt_ids, chosen_ids, rejected_ids   tokens

Arrow processes whole columns at once, without a Python object per row.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def has_chat_template(entry: Mapping[str, Any]) -> bool:
    """Whether axolotl formats a data set with a chat template.

    Args:
        entry: An entry of `datasets:` or `test_datasets:`.
    """
    return str(entry.get("type")).startswith("chat_template")


def arrow_tables(dataset: Dataset, columns: list[str]) -> Iterator[Any]:
    """Yields Arrow tables of some columns, with 1000 rows each."""
    return dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000)


def _lengths(table: Any) -> list[np.ndarray]:
    """Numbers of tokens of prompt, chosen and rejected; each of shape (pairs,)."""
    return [pc.list_value_length(table[name]).to_numpy() for name in IDS]


def token_counts(dataset: Dataset) -> np.ndarray:
    """Numbers of tokens of each prompt, chosen and rejected answer.

    Args:
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Returns:
        Shape (3, pairs).
    """
    return np.concatenate([*map(_lengths, arrow_tables(dataset, IDS))], axis=1)


def long_pairs(dataset: Dataset, max_length: int) -> int:
    """Number of pairs in which TRL's collator truncates a sequence.

    Args:
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length: Most tokens of a sequence.
    """
    count = 0
    for table in arrow_tables(dataset, IDS):
        prompt, chosen, rejected = _lengths(table)
        count += int((prompt + chosen.clip(rejected) > max_length).sum())
    return count


def scored_lengths(dataset: Dataset, max_length: int | None) -> np.ndarray:
    """Number of scored tokens of each pair: those of both completions.

    Args:
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length: Most tokens of a sequence; None: no limit.

    Returns:
        Shape (pairs,).
    """
    lengths = []
    for table in arrow_tables(dataset, IDS):
        prompt, *completions = _lengths(table)
        limit = np.iinfo(prompt.dtype).max if max_length is None else max_length
        room = limit - prompt
        unscored = prompt == 0  # no position predicts the first token of a sequence
        kept = [np.minimum(completion, room) for completion in completions]
        lengths.append(sum(length - unscored for length in kept))
    return np.concatenate(lengths)


def token_rows(dataset: Dataset) -> Iterator[list[np.ndarray]]:
    """Yields for each pair the tokens of prompt, chosen and rejected.

    Args:
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    for table in arrow_tables(dataset, IDS):
        columns = [table[name].combine_chunks() for name in IDS]
        ends = [column.offsets.to_numpy() for column in columns]
        flat = [column.values.to_numpy() for column in columns]
        for row in range(len(table)):
            yield [x[e[row] : e[row + 1]] for x, e in zip(flat, ends, strict=True)]
