"""Prepares the pairs of a recipe with axolotl, checks every one, says what it found.

`axolotl preprocess`, `train` and `evaluate` all come through here.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import pyarrow.compute as pc
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.shared import (
    datasets_with_name_generator,
    load_dataset_with_config,
)
from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from .. import upstream_data
from ..errors import quote, refuse
from . import prepared
from .boundary import repeated_start
from .checks import check_loaded, check_tokens
from .columns import arrow_tables, has_chat_template
from .conversation import PairError
from .evaluation_sets import numbered, set_names
from .images import ImageTokens, has_images
from .layout import LayoutSettings
from .pair_maker import (
    LEFT_OUT,
    LENGTHS,
    MERGED,
    NOTES,
    REPEATED,
    TEMPLATE,
    PairMaker,
)
from .rendering import ChatTemplate

LOG = get_logger(__name__)

FIELDS = {
    "messages": "field_messages",
    "chosen": "field_chosen",
    "rejected": "field_rejected",
}
# Kind of note -> what it means, and a remedy if there is one.
MEANINGS = {
    TEMPLATE: "are trained as the chat template writes the whole conversation, where "
    "`rl: dpo` of this axolotl trains another text",
    MERGED: "have a prompt whose last characters the tokenizer merges with the answer: "
    "they are scored with it",
    REPEATED: "have a prompt that begins as the tokenizer begins every text: the start "
    "is there once, and twice under `rl: dpo`",
    LEFT_OUT: "have something that the chat template leaves out or rewrites",
}

# Why pairs with images are not packed.
PADDED = "the processor lays out pairs with images, a padded row per sequence"
# axolotl's type that leaves rows as they are.
UNTYPED = "passthrough"

Prepare = Callable[[Any, Any], tuple[Dataset, Dataset | None]]


def prepare(load: Prepare, cfg: Any, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Loads the train set and the evaluation set of a recipe.

    Args:
        load: axolotl's function, of the same arguments and results.
        cfg: axolotl's config.
        tokenizer: The recipe's tokenizer.

    Raises:
        ValueError: If the data cannot be trained on as they are. One line names data
            set, file, row and remedy.
    """
    train, evaluation = load_noted(load, cfg, tokenizer)
    if evaluation is not None:
        evaluation = _log_notes("test_datasets", evaluation)
    return _log_notes("datasets", train), evaluation


def load_noted(
    load: Prepare, cfg: Any, tokenizer: Any
) -> tuple[Dataset, Dataset | None]:
    """Loads both sets with the columns NOTES and LENGTHS, and logs no notes.

    The arguments and errors are those of `prepare`.
    """
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of `{cfg.tokenizer_config or cfg.base_model}` has no end "
            "of text: set `special_tokens: {eos_token: ...}`"
        )
    cfg = with_types(cfg)
    preparation = Preparation(cfg, tokenizer, images=_image_tokens(cfg, tokenizer))
    with upstream_data.preparing_with(preparation):
        train, evaluation = load(cfg, tokenizer)
    for key, data in (("datasets", train), ("test_datasets", evaluation)):
        if data is not None:
            check_loaded(key, data, cfg.sequence_len)
    if any(has_images(data) for data in (train, evaluation) if data is not None):
        _check_images(cfg, train, evaluation)
    return train, evaluation


def _image_tokens(cfg: Any, tokenizer: Any) -> ImageTokens | None:
    """Makes the tokenizer of pairs with images; None if only text can be trained."""
    if not (cfg.is_multimodal and upstream_data.takes_images()):
        return None
    collator = upstream_data.image_collator(cfg, tokenizer)
    collator.max_length = None
    return ImageTokens(collator, dict(cfg.chat_template_kwargs or {}))


def _check_images(cfg: Any, train: Dataset, evaluation: Dataset | None) -> None:
    """Refuses layouts that pairs with images cannot have, and sets of two kinds.

    Raises:
        ValueError: Names the key and what to set.
    """
    layout, eval_packs = LayoutSettings.from_config(cfg), cfg.edpo_eval_sample_packing
    if layout.may_pad:
        LOG.warning(f"`sample_packing: auto`: batches are padded: {PADDED}.")
    packing = {
        "sample_packing": layout.balances and not layout.may_pad,
        "dpo_padding_free": cfg.dpo_padding_free,
        "eval_sample_packing": eval_packs,
        "edpo_prefix_sharing": layout.shares is True,
    }
    for key, wanted in packing.items():
        if wanted:
            refuse(key, True, f"remove it: {PADDED}")
    sets = {"datasets": train, "test_datasets": evaluation}
    for key, data in sets.items():
        if data is not None and not has_images(data):
            raise ValueError(
                f"`{key}` has no column `images`, and the other set has one: add it; "
                "it may be empty"
            )
    check_tokens("train", train)
    if evaluation is not None:
        check_tokens("eval", evaluation)


def with_types(cfg: Any) -> Any:
    """A copy of the config whose entries without a type have axolotl's `passthrough`.

    It leaves rows as they are, and lets `PairMaker` see them.
    """
    kind = type(cfg)
    typed = {
        key: [kind({**e, "type": e.get("type") or UNTYPED}) for e in cfg[key]]
        for key in ("datasets", "test_datasets")
        if cfg.get(key)
    }
    return kind({**cfg, **typed})


@dataclass
class Preparation:
    """Takes the place of some functions of axolotl while it prepares data.

    Attributes:
        cfg: axolotl's config.
        tokenizer: The recipe's tokenizer.
        key: What is loaded: `datasets` or `test_datasets`.
        makers: Number of an entry -> what makes its pairs.
        images: Tokenizes pairs with images; None beside a text model.
    """

    cfg: Any
    tokenizer: Any
    key: str = "datasets"
    makers: dict[int, PairMaker] = field(default_factory=dict)
    images: ImageTokens | None = None
    _parts: dict[str, dict[str, str]] = field(default_factory=dict)

    def load_split(self, load: Callable, cfg: Any, split: str) -> Dataset:
        """Loads one set; a row that is refused is looked for, to name it.

        Raises:
            ValueError: Names the file, the row and the remedy.
        """
        self.key = "datasets" if split == "train" else "test_datasets"
        self.makers, parts = {}, self._made_of(cfg[self.key])
        changed = prepared.changes(upstream_data.prepared_root(cfg), parts)
        if changed:
            LOG.info(
                f"`{self.key}`: prepared anew, as {' and '.join(changed)} changed."
            )
        try:
            dataset = load(cfg, split=split)
        except PairError as error:
            raise ValueError(self._where(cfg) + str(error)) from None
        except (DatasetGenerationError, ArrowInvalid) as error:
            raise ValueError(_unreadable(cfg, self.key, error)) from error
        if not cfg.skip_prepare_dataset:
            name = prepared.folder_name(upstream_data.prepared_root(cfg), parts)
            prepared.write(upstream_data.prepared_path(cfg, name), parts)
        return self._short_enough(dataset) if has_images(dataset) else dataset

    def _short_enough(self, dataset: Dataset) -> Dataset:
        """Drops long pairs with images, as axolotl drops long pairs of text."""
        kept, limit = self.is_kept(), self.cfg.sequence_len
        lengths = enumerate(dataset[LENGTHS])
        rows = [
            row
            for row, tokens in lengths
            if kept({LENGTHS: tokens}, sequence_len=limit)
        ]
        if len(rows) == len(dataset):
            return dataset
        LOG.warning(
            f"`{self.key}`: {len(dataset) - len(rows)} of {len(dataset)} pairs with "
            "images are dropped, as they have more tokens than "
            f"`sequence_len: {limit}`."
        )
        return dataset.select(rows)

    def _where(self, cfg: Any) -> str:
        """Names data set, row, file and type of the row that was refused."""
        number = max(self.makers)
        entry = cfg[self.key][number]
        row = _first_refused(entry, self.makers[number], cfg)
        kind = "" if _is_untyped(entry) else f" ({quote('type', entry['type'])})"
        return f"`{self.key}`: row {row} of `{entry['path']}`{kind}: "

    def load_type(self, load: Callable, kind: str, cfg: Any, dataset_idx: int) -> Any:
        """What axolotl applies to each row of an entry: its type, and then `PairMaker`.

        axolotl reads the options of a type from the entry of `datasets:` of this
        number, for `test_datasets:` too. So it gets its own entries as `datasets:`.

        Returns:
            A function and keywords of `Dataset.map`; None for a type that is not there.
        """
        as_datasets = type(cfg)({**cfg, "datasets": cfg[self.key]})
        found = load(kind, as_datasets, dataset_idx=dataset_idx)
        if found is None:
            return None
        transform, keywords = found if isinstance(found, tuple) else (found, {})
        if "tokenizer" in signature(transform).parameters:
            transform = partial(transform, tokenizer=self.tokenizer)
        entry = cfg[self.key][dataset_idx]
        kind = "chat_template.default" if kind == "chat_template" else kind
        strict = (cfg.excess_length_strategy or "").lower() == "raise"
        maker = PairMaker(
            kind,
            transform,
            {name: entry.get(key) or name for name, key in FIELDS.items()},
            self._template(),
            repeated_start(self.tokenizer),
            self.images,
            cfg.sequence_len if strict else None,
        )
        self.makers[dataset_idx] = maker
        if self._numbers(cfg[self.key]):
            return partial(numbered, maker, dataset_idx), keywords
        return maker, keywords

    def folder_name(self, cfg: Any, entries: Any, tokenizer_name: str) -> str:
        """Names the folder of prepared data; takes what axolotl's function takes."""
        root = upstream_data.prepared_root(cfg)
        return prepared.folder_name(root, self._made_of(entries))

    @staticmethod
    def truncate(sample: Any, **_: Any) -> Any:
        """A pair that is too long, as it is: the collator truncates its tokens.

        axolotl would turn the tokens that are left into text, which has other tokens,
        and TRL would end it with an end of text.
        """
        return sample

    def is_kept(self) -> Callable[..., bool]:
        """The function of a pair that tells whether it is short enough."""
        strategy = (self.cfg.excess_length_strategy or "drop").lower()
        return partial(_is_kept, truncates=strategy == "truncate")

    def _numbers(self, entries: Any) -> bool:
        """Whether pairs of these entries get the number of their set."""
        return bool(set_names(self.cfg)) and entries == self.cfg.test_datasets

    def _made_of(self, entries: Any) -> dict[str, str]:
        numbers = (
            {"the sets of `test_datasets`": "numbered"}
            if self._numbers(entries)
            else {}
        )
        key = json.dumps(entries, default=str)
        if key not in self._parts:
            source = self._template().source or self.tokenizer.chat_template
            processor = self.images and self.images.collator.processor
            self._parts[key] = numbers | prepared.made_of(
                self.cfg, entries, self.tokenizer, source or "", processor
            )
        return self._parts[key]

    def _template(self) -> ChatTemplate:
        """The chat template of the recipe; without a type that needs it, that of the
        tokenizer, which may have none."""
        every = [*(self.cfg.datasets or ()), *(self.cfg.test_datasets or ())]
        keywords = dict(self.cfg.chat_template_kwargs or {})
        if not any(map(has_chat_template, every)):
            return ChatTemplate(self.tokenizer, None, keywords)
        source = get_chat_template_from_config(self.cfg, None, self.tokenizer)
        return ChatTemplate(self.tokenizer, source, keywords)


def _is_kept(
    sample: Mapping[str, Any],
    rl: Any = None,
    tokenizer: Any = None,
    sequence_len: int = 0,
    truncates: bool = False,
) -> bool:
    """Whether a pair is short enough, in tokens as they are trained."""
    prompt, longest = sample[LENGTHS]
    return prompt < sequence_len if truncates else longest <= sequence_len


def _first_refused(entry: Any, maker: PairMaker, cfg: Any) -> int:
    """Number of the first row that is refused; the first row is 1."""
    for number, row in enumerate(_rows_of(entry, cfg), 1):
        try:
            maker(row)
        except PairError:
            return number
    raise AssertionError("a row was refused, and now none is")


def count_rows(entries: Iterable[Any], cfg: Any) -> int:
    """Number of rows of entries of `datasets:`, before any is dropped."""
    each = datasets_with_name_generator(entries)
    return sum(len(_rows_of(entry, cfg)) for entry in each)


def _rows_of(entry: Any, cfg: Any) -> Dataset:
    loaded = load_dataset_with_config(entry, cfg.hf_use_auth_token)
    return loaded["train"] if isinstance(loaded, DatasetDict) else loaded


def _unreadable(cfg: Any, key: str, error: Exception) -> str:
    """The message for a file that cannot be read: which one, and why."""
    cause = error.__cause__ or error
    for entry in cfg[key]:
        try:
            _rows_of(entry, cfg)
        except (DatasetGenerationError, ArrowInvalid):
            return f"`{key}`: `{entry['path']}` cannot be read: {cause}"
    return f"`{key}` cannot be read: {cause}"


def _is_untyped(entry: Mapping[str, Any]) -> bool:
    return entry["type"] == UNTYPED


def _log_notes(key: str, dataset: Dataset) -> Dataset:
    """Logs a warning for each kind of note; returns the data without their columns."""
    for line in notes_in_words(key, dataset):
        LOG.warning(f"{line} `axolotl edpo-inspect` shows them.")
    return dataset.remove_columns([NOTES, LENGTHS])


def notes_in_words(key: str, dataset: Dataset) -> list[str]:
    """A line for each kind of note: how many pairs, why, and the first of them."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for table in arrow_tables(dataset, [NOTES]):
        column = table[NOTES]
        for notes in column.filter(pc.not_equal(column, "")).to_pylist():
            lines = [note.partition(": ") for note in notes.split("\n")]
            counts.update({kind for kind, _, _ in lines})
            for kind, _, detail in lines:
                examples.setdefault(kind, detail)
    return [
        f"`{key}`: {counts[kind]} of {len(dataset)} pairs {meaning}. The first: "
        f"{examples[kind]}."
        for kind, meaning in MEANINGS.items()
        if counts[kind]
    ]
