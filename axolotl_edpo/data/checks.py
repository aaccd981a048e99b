"""Pairs that cannot be trained on, or that teach nothing: found in their columns.

    of axolotl    prompt, chosen, rejected               text
    of TRL        prompt_ids, chosen_ids, rejected_ids   tokens

Columns are read as Arrow arrays, piece by piece: no row becomes a Python object.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from axolotl.common.datasets import TrainDatasetMeta, load_preference_datasets
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.logging import get_logger
from datasets import Dataset, Value

from ..config.dataset_entries import has_chat_template

LOG = get_logger(__name__)

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
ANSWERS = ("chosen", "rejected")
# Columns by which axolotl and TRL know data with pictures.
PICTURES = ("image", "images")
# What axolotl's `chat_template` types put before an answer, and cut off again: where
# there is no answer, they find nothing to cut off.
DUMMY = "[[dummy_message]]"
# How axolotl begins to say that a text is absent, or empty, in some row.
NO_TEXT = "Prompt, chosen and rejected keys are required"


def load(cfg: Any) -> TrainDatasetMeta:
    """The data sets of a recipe, as axolotl loads them.

    Args:
        cfg: axolotl's config.

    Raises:
        ValueError: One line that names the data and what it lacks, where axolotl's
            error would not, or where it would train.
    """
    try:
        meta = load_preference_datasets(cfg=cfg)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, ValueError) and not str(error).startswith(NO_TEXT):
            raise
        found = f"{type(error).__name__}: {error}"
        raise ValueError(_unlike_its_type(cfg, found)) from error
    for key, dataset in (
        ("datasets", meta.train_dataset),
        ("test_datasets", meta.eval_dataset),
    ):
        if dataset is not None:
            _check_pictures(key, dataset)
            _check_texts(key, dataset, cfg)
    return meta


def _unlike_its_type(cfg: Any, found: str) -> str:
    """The refusal of data whose rows are not what `type` takes them for."""
    sets = []
    for entry in _entries(cfg):
        columns = load_dataset_with_config(entry, cfg.hf_use_auth_token).column_names
        sets.append(f"{entry.path} (`type: {entry.type}`) has {', '.join(columns)}")
    return (
        f"`datasets`: a row is not as its `type` takes it ({found}); "
        f"{'; '.join(sets)}: set another `type`, or its `field_*` keys"
    )


def _entries(cfg: Any) -> list[Any]:
    return [*(cfg.datasets or []), *(cfg.test_datasets or [])]


def _check_pictures(key: str, dataset: Dataset) -> None:
    """Refuses data that TRL would make no tokens of before it sees the pictures."""
    for name in PICTURES:
        if name in dataset.column_names:
            raise ValueError(
                f"`{key}`: there is a column `{name}`, and `rl: edpo` trains on text "
                "only: remove the column from the data, or use `rl: dpo`"
            )


def _check_texts(key: str, dataset: Dataset, cfg: Any) -> None:
    """Refuses what cannot become pairs, before a model is loaded."""
    if not len(dataset):
        raise ValueError(
            f"`{key}` leaves no pair to train on: every one is longer than "
            f"`sequence_len: {cfg.sequence_len}` (raise it), or there was none"
        )
    absent = [name for name in ANSWERS if name not in dataset.column_names]
    if absent:
        raise ValueError(
            f"`{key}`: there is no column `{absent[0]}`, only "
            f"{', '.join(dataset.column_names)}: set a `type` that makes it"
        )
    for name in ANSWERS:
        _warn_of_cut_answers(key, dataset, name, cfg)
        rows = _rows(dataset, name, lambda texts: pc.match_substring(texts, DUMMY))
        if len(rows):
            raise ValueError(
                f"`{key}`: {len(rows)} of {len(dataset)} pairs have no text in "
                f"`{name}`, where axolotl's chat template puts {DUMMY}: remove them. "
                f"{_start(dataset, rows[0])}"
            )


def _warn_of_cut_answers(key: str, dataset: Dataset, column: str, cfg: Any) -> None:
    """Says where axolotl, till 0.20, left the last character of an answer only.

    Its `chat_template` types look for the answer in what the template wrote, and do not
    find it where the template trims white space around it.
    """
    if not any(map(has_chat_template, _entries(cfg))):
        return
    rows = _rows(dataset, column, lambda texts: pc.equal(pc.utf8_length(texts), 1))
    if len(rows):
        LOG.warning(
            f"`{key}`: of {len(rows)} of {len(dataset)} answers in `{column}` axolotl "
            f"left one character, as the chat template trims white space around them: "
            f"remove it from the data. {_start(dataset, rows[0])}"
        )


def _rows(dataset: Dataset, column: str, test: Callable[[Any], Any]) -> np.ndarray:
    """Where a test of a column's texts holds; nowhere, if they are no texts."""
    if dataset.features[column] != Value("string"):
        return np.empty(0, int)
    found = [
        test(table[column]).to_numpy(zero_copy_only=False)
        for table in _tables(dataset, [column])
    ]
    return np.flatnonzero(np.concatenate(found))


def check_tokens(dataset_name: str, dataset: Dataset) -> None:
    """Looks for pairs without an answer, and for pairs of one and the same answer.

    Args:
        dataset_name: For the message.
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: If an answer has no token, or if no two answers differ.
    """
    total = len(dataset)
    flags = [_empty_and_same(table) for table in _tables(dataset, IDS)]
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


def _start(dataset: Dataset, row: int) -> str:
    """Which pair it is: axolotl shuffles, so a number would not say it."""
    pair = dataset[int(row)]
    return f"The first begins {str(pair.get('prompt', pair.get('prompt_ids')))[:60]!r}"


def _empty_and_same(table: Any) -> np.ndarray:
    """Shape (2, pairs): an answer has no token; both have the same."""
    chosen, rejected = (table[name].combine_chunks() for name in IDS[1:])
    lengths, others = (
        pc.list_value_length(answers).to_numpy() for answers in (chosen, rejected)
    )
    same = lengths == others
    empty = np.minimum(lengths, others) == 0
    equally_long = pyarrow.array(same)
    a, b = (
        pc.list_flatten(answers.filter(equally_long)).to_numpy(zero_copy_only=False)
        for answers in (chosen, rejected)
    )
    # how many tokens differ, pair by pair of those that are equally long
    differ = np.concatenate([[0], np.cumsum(a != b)])
    ends = np.cumsum(lengths[same])
    same[same] = differ[ends] == differ[ends - lengths[same]]
    return np.stack([empty, same])


def long_pairs(dataset: Dataset, max_length: int) -> int:
    """Pairs of which TRL's collator truncates a sequence.

    Args:
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length: Tokens that a sequence may have.
    """
    count = 0
    for table in _tables(dataset, IDS):
        prompt, chosen, rejected = _lengths(table)
        count += int((prompt + chosen.clip(rejected) > max_length).sum())
    return count


def scored_lengths(dataset: Dataset, max_length: int | None) -> np.ndarray:
    """Tokens of both answers that are scored, of each pair; shape (pairs,).

    Args:
        dataset: Tokenized, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length: Tokens that a sequence keeps; None: all.
    """
    found = []
    for table in _tables(dataset, IDS):
        prompt, *answers = _lengths(table)
        room = np.iinfo(int).max if max_length is None else max_length - prompt
        unseen = prompt == 0  # no position predicts the first token of a sequence
        found.append(sum(np.minimum(answer, room) - unseen for answer in answers))
    return np.concatenate(found)


def token_rows(dataset: Dataset) -> Iterator[list[np.ndarray]]:
    """Tokens of prompt, chosen and rejected of each pair."""
    for table in _tables(dataset, IDS):
        columns = [table[name].combine_chunks() for name in IDS]
        ends = [column.offsets.to_numpy() for column in columns]
        flat = [column.values.to_numpy() for column in columns]
        for row in range(len(table)):
            yield [x[e[row] : e[row + 1]] for x, e in zip(flat, ends, strict=True)]


def _lengths(table: Any) -> list[np.ndarray]:
    """Tokens of prompts, chosen and rejected, each of shape (pairs,)."""
    return [pc.list_value_length(table[name]).to_numpy() for name in IDS]


def _tables(dataset: Dataset, columns: list[str]) -> Iterator[Any]:
    return dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000)
