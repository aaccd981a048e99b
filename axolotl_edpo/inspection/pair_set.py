"""From a recipe to the tokens that its trainer gets, by the path of `axolotl train`.

axolotl's config → `data/preparation.py` → the tokenization of `EDPOTrainer`
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from axolotl.loaders import load_tokenizer
from datasets import Dataset

from .. import upstream_data
from ..data.checks import same_answers
from ..data.columns import arrow_tables, token_counts
from ..data.images import has_images
from ..data.pair_maker import NOTES
from ..data.preparation import count_rows, load_noted
from ..errors import quote
from ..recipe import config_of
from ..trainer import EDPOTrainer

# Kinds of notes that are read from tokens, beside those of `data/pair_maker.py`.
TRUNCATED, SAME = "truncated", "same"
# The name of a set in messages about its tokens, as TRL's trainer has it.
NAMES = {"datasets": "train", "test_datasets": "eval"}


@dataclass(frozen=True)
class PairSet:
    """Pairs that will be trained, or evaluated.

    Attributes:
        key: `datasets` or `test_datasets`.
        pairs: Tokenized, with the columns of `EDPOTrainer` and with NOTES.
        left_out: Rows of the data that no set has; None if the data are not here.
        reasons: Why rows may be left out, in words.
        tokenizer: The recipe's tokenizer.
        max_length: Most tokens of a sequence.
    """

    key: str
    pairs: Dataset
    left_out: int | None
    reasons: str
    tokenizer: Any
    max_length: int

    def __len__(self) -> int:
        return len(self.pairs)

    def flags(self, kind: str) -> np.ndarray:
        """Which pairs have a note.

        Args:
            kind: TRUNCATED, SAME, a kind of `data/pair_maker.py`, or `any` of these.

        Returns:
            Shape (pairs,), bool.
        """
        if kind == TRUNCATED:
            prompt, *answers = token_counts(self.pairs)
            return prompt + np.maximum(*answers) > self.max_length
        if kind == SAME:
            return same_answers(self.pairs)
        if kind == "any":
            noted = self._matching(".")
            return noted | self.flags(TRUNCATED) | self.flags(SAME)
        return self._matching(f"(?m)^{kind}: ")

    def _matching(self, pattern: str) -> np.ndarray:
        """Which notes match; shape (pairs,), bool."""
        return np.concatenate(
            [
                pc.match_substring_regex(table[NOTES], pattern).to_numpy()
                for table in arrow_tables(self.pairs, [NOTES])
            ]
        )


def load(recipe: str, key: str) -> PairSet:
    """Prepares and tokenizes the pairs of a recipe.

    Args:
        recipe: Path of the YAML file.
        key: `datasets` or `test_datasets`.

    Raises:
        ValueError: As `axolotl train` does, if it refuses the recipe or a row; if the
            recipe is not one of `rl: edpo`, or has no such set.
    """
    with config_of(recipe, "edpo-inspect") as cfg:
        return _pair_set(cfg, key)


def _pair_set(cfg: Any, key: str) -> PairSet:
    tokenizer = load_tokenizer(cfg)
    train, evaluation = load_noted(upstream_data.pairs_loader(), cfg, tokenizer)
    found = train if key == "datasets" else evaluation
    if found is None:
        raise ValueError(
            f"the recipe has no `{key}`: set it, or `val_set_size`, to evaluate"
        )
    pairs = found
    if not has_images(found):  # those have their tokens already
        pairs = upstream_data.tokenize_pairs(
            EDPOTrainer,
            found,
            tokenizer,
            NAMES[key],
            cfg.sequence_len,
            cfg.dataset_num_proc,
        )
    reasons = f"longer than {quote('sequence_len', cfg.sequence_len)}"
    if cfg.dataset_exact_deduplication:
        reasons += ", or there twice (`dataset_exact_deduplication`)"
    return PairSet(
        key,
        pairs,
        _left_out(cfg, key, [train, evaluation], len(found) - len(pairs)),
        reasons,
        tokenizer,
        cfg.sequence_len,
    )


def _left_out(cfg: Any, key: str, sets: list[Dataset | None], late: int) -> int | None:
    """Number of rows that are in no set; None if the data are not on this machine.

    Args:
        cfg: axolotl's config.
        key: `datasets` or `test_datasets`.
        sets: What axolotl prepared for training and for evaluation.
        late: Rows that TRL leaves out after that.
    """
    if not cfg.test_datasets:  # evaluation pairs are taken from `datasets`
        entries, made = cfg.datasets, sets
    else:
        entries, made = cfg[key], [sets[key == "test_datasets"]]
    try:
        rows = count_rows(entries, cfg)
    except (OSError, ValueError):
        return None
    return rows - sum(len(data) for data in made if data is not None) + late
