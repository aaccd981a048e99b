"""Checks the data: refuses pairs that cannot be trained on, warns of useless ones."""

from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from axolotl.utils.logging import get_logger
from datasets import Dataset

from .columns import IDS, arrow_tables, long_pairs

LOG = get_logger(__name__)


def check_loaded(key: str, dataset: Dataset, sequence_len: int) -> None:
    """Refuses data without pairs.

    Args:
        key: `datasets` or `test_datasets`.
        dataset: What axolotl prepared of it.
        sequence_len: Most tokens of a sequence.

    Raises:
        ValueError: Names the data set, what it lacks and the remedy.
    """
    if not len(dataset):
        raise ValueError(
            f"`{key}` leaves no pair to train on: every one is longer than "
            f"`sequence_len: {sequence_len}` (raise it), or there was none"
        )


def check_tokens(dataset_name: str, dataset: Dataset) -> None:
    """Refuses pairs with an empty answer; warns of pairs with two equal answers.

    Args:
        dataset_name: `train` or `eval`, for messages.
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: If there is no pair, if an answer has no token, or if the two
            answers are equal in every pair of the train set.
    """
    total = len(dataset)
    flags = [_empty_and_same(table) for table in arrow_tables(dataset, IDS)]
    if not flags:
        raise ValueError(f"{dataset_name} set: no pair is left: raise `sequence_len`")
    empty, same = map(np.flatnonzero, np.concatenate(flags, axis=1))
    if len(empty):
        raise ValueError(
            f"{dataset_name} set: {len(empty)} of {total} pairs have an answer without "
            f"tokens: remove them, or see whether the chat template writes answers. "
            f"{_start(dataset, empty[0])}"
        )
    if len(same) == total and dataset_name == "train":
        raise ValueError(
            f"{dataset_name} set: chosen and rejected are the same in all {total} "
            "pairs: see `field_chosen`, `field_rejected` and the chat template"
        )
    if len(same):
        LOG.warning(
            f"{dataset_name} set: chosen and rejected are the same in {len(same)} of "
            f"{total} pairs: they teach nothing. {_start(dataset, same[0])}"
        )


def same_answers(dataset: Dataset) -> np.ndarray:
    """Which pairs have the same tokens as chosen and as rejected.

    Args:
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Returns:
        Shape (pairs,), bool.
    """
    tables = arrow_tables(dataset, IDS)
    return np.concatenate([_empty_and_same(table)[1] for table in tables])


def _start(dataset: Dataset, row: int) -> str:
    """Quotes the start of a prompt, to find the pair: axolotl shuffles the rows."""
    pair = dataset[int(row)]
    return f"The first begins {str(pair.get('prompt', pair.get('prompt_ids')))[:60]!r}"


def _empty_and_same(table: Any) -> np.ndarray:
    """Which pairs have an empty answer, and which have two equal answers.

    Returns:
        Shape (2, pairs), bool.
    """
    answers = [table[name].combine_chunks() for name in IDS[1:]]
    chosen, rejected = (pc.list_value_length(column).to_numpy() for column in answers)
    empty = np.minimum(chosen, rejected) == 0
    same = chosen == rejected
    equally_long, lengths = pyarrow.array(same), chosen[same]
    chosen_ids, rejected_ids = (
        pc.list_flatten(column.filter(equally_long)).to_numpy(zero_copy_only=False)
        for column in answers
    )
    # running count of tokens that differ, over all pairs of equally long answers
    differences = np.concatenate([[0], np.cumsum(chosen_ids != rejected_ids)])
    ends = np.cumsum(lengths)
    same[same] = differences[ends] == differences[ends - lengths]
    return np.stack([empty, same])


def preference_columns(dataset: Dataset) -> Dataset:
    """Removes columns from which TRL would infer the wrong format.

    TRL looks at one column to distinguish text from messages, and adds no `eos_token`
    to messages. It picks any column whose name it knows, and each process may pick
    another.
    """
    misleading = {"messages", "completion"} & set(dataset.column_names or ())
    return dataset.remove_columns([*misleading])


def check_prepared(
    dataset_name: str, before: Dataset, prepared: Any, max_length: int | None
) -> None:
    """Checks a tokenized data set; warns of pairs dropped or cut by `sequence_len`.

    Args:
        dataset_name: `train` or `eval`, for messages.
        before: The data set before TRL tokenized it.
        prepared: The tokenized data set. Other types than `Dataset` are not checked.
        max_length: Most tokens of a sequence; None: no limit.

    Raises:
        ValueError: See `check_tokens`.
    """
    if not isinstance(prepared, Dataset):
        return
    check_tokens(dataset_name, prepared)
    if max_length is None:
        return
    dropped, truncated = len(before) - len(prepared), long_pairs(prepared, max_length)
    if dropped or truncated:
        LOG.warning(
            f"{dataset_name} set, `sequence_len: {max_length}`: "
            f"{dropped} of {len(before)} pairs dropped (the prompt alone "
            f"fills it), {truncated} truncated (an answer ends after it)."
        )
