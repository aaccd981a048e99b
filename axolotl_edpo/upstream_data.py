"""Private and moving names of axolotl's loading of data; see `upstream.py`."""

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def entry_keys() -> set[str]:
    """Keys of an entry of `datasets:` that axolotl reads with `rl: dpo`.

    axolotl 0.19 to 0.21 remove all others, without a word.
    """
    from axolotl.utils.schemas.datasets import DPODataset

    return {*DPODataset.model_fields}


def text_type_keys() -> set[str]:
    """Keys of a `type` that names columns and formats; axolotl removes all others."""
    from axolotl.utils.schemas.datasets import UserDefinedDPOType

    return {*UserDefinedDPOType.model_fields}


def pair_types() -> set[str]:
    """First words of axolotl's types of preference data, such as `chatml`."""
    from axolotl.prompt_strategies import dpo

    return {module.name for module in pkgutil.iter_modules(dpo.__path__)}


def file_type(path: str) -> str:
    """The format of a data file, which axolotl infers from its name with `rl`."""
    from axolotl.utils.data.shared import get_dataset_type
    from axolotl.utils.dict import DictDefault

    return get_dataset_type(DictDefault(path=path))


def prepare_pairs_with(prepare: Callable[..., Any], is_ours: Callable) -> None:
    """Lets a function prepare the pairs of our recipes, for every command of axolotl.

    A plugin's hook `load_datasets` is not called by `axolotl evaluate`. All commands of
    axolotl 0.19 to 0.21 find `prepare_preference_datasets` in this Python module.

    Args:
        prepare: Takes axolotl's function, a config and a tokenizer.
        is_ours: Whether a config is one of `rl: edpo`.
    """
    from axolotl.common import datasets

    load = pairs_loader()

    def call(cfg: Any, tokenizer: Any) -> Any:
        return prepare(load, cfg, tokenizer) if is_ours(cfg) else load(cfg, tokenizer)

    call.of_axolotl = load  # type: ignore[attr-defined]
    datasets.prepare_preference_datasets = call


def pairs_loader() -> Callable[[Any, Any], Any]:
    """axolotl's function that prepares pairs, without what `prepare_pairs_with` adds.

    It takes a config and a tokenizer, and returns two data sets.
    """
    from axolotl.common import datasets

    load: Any = datasets.prepare_preference_datasets
    return getattr(load, "of_axolotl", load)


def tokenize_pairs(
    trainer_class: Any,
    dataset: Any,
    tokenizer: Any,
    name: str,
    max_length: int,
    num_proc: int | None,
) -> Any:
    """Tokenizes pairs as a trainer does when it is made, without its model.

    Of itself, the trainer of TRL 1.9 to 1.14 uses nothing but the tokenizer for this.

    Args:
        trainer_class: TRL's `DPOTrainer`, or a class that is derived from it.
        dataset: What axolotl prepared.
        tokenizer: The recipe's tokenizer.
        name: `train` or `eval`, for messages.
        max_length: Most tokens of a sequence.
        num_proc: Number of processes; None: this one.
    """
    from trl import DPOConfig

    trainer = object.__new__(trainer_class)
    trainer._tokenizer = tokenizer
    arguments = SimpleNamespace(
        max_length=max_length,
        truncation_mode=DPOConfig.truncation_mode,
        dataset_num_proc=num_proc,
    )
    return trainer._prepare_dataset(dataset, tokenizer, arguments, name)


@contextmanager
def preparing_with(preparation: Any) -> Iterator[None]:
    """Puts methods of a `Preparation` in the place of functions of axolotl.

    Private names of `axolotl.utils.data.rl` in 0.19 to 0.21, called there by name.
    """
    from axolotl.utils.data import rl

    is_kept = preparation.is_kept()
    new = {
        "load_dpo": partial(preparation.load_type, rl.load_dpo),
        "_load_split": partial(preparation.load_split, rl._load_split),
        "generate_dataset_hash_from_config": preparation.folder_name,
        "_drop_long_sequences": is_kept,
        "_truncate_long_sequences_rl": preparation.truncate,
    }
    before = {name: getattr(rl, name) for name in new}
    vars(rl).update(new)
    try:
        yield
    finally:
        vars(rl).update(before)


def prepared_root(cfg: Any) -> Path:
    """The folder in which axolotl keeps prepared data."""
    from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH

    return Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)


def prepared_path(cfg: Any, name: str) -> Path:
    """Where prepared data are, of which the folder has this name."""
    from axolotl.utils.data.shared import get_prepared_dataset_path

    return get_prepared_dataset_path(cfg, name)


def takes_images() -> bool:
    """Whether axolotl's preference training takes images; from 0.21 on."""
    from axolotl.core.builders.rl import HFRLTrainerBuilder

    return hasattr(HFRLTrainerBuilder, "_build_vision_collator")


def image_collator(cfg: Any, tokenizer: Any) -> Any:
    """The collator of pairs with images that axolotl's builder makes, without a model.

    Private methods of the builder in 0.21. They read three of its attributes.

    Args:
        cfg: axolotl's config of a vision-language model.
        tokenizer: The recipe's tokenizer.
    """
    from axolotl.core.builders.rl import HFRLTrainerBuilder
    from axolotl.loaders import load_processor

    builder = SimpleNamespace(cfg=cfg, tokenizer=tokenizer)
    builder.processor = load_processor(cfg, tokenizer)
    HFRLTrainerBuilder._prepare_vision_processor(builder)
    return HFRLTrainerBuilder._build_vision_collator(builder)
