"""Reads a recipe as `axolotl train` does, for commands that train nothing.

A machine without the GPUs of the run will do. No engine is started, no data are
prepared, and nothing is written into the folder of the run.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from axolotl.cli.config import load_cfg

from .errors import quote
from .plugin import TRAINER
from .upstream import without_engine


@contextmanager
def config_of(recipe: str, command: str) -> Iterator[Any]:
    """Within it, axolotl's validated config of a recipe; its log is quiet.

    Args:
        recipe: Path of the YAML file.
        command: The command of axolotl that asks, for the message.

    Raises:
        ValueError: As `axolotl train` does, if it refuses the recipe; if the file is no
            YAML; if there is no config of `base_model`; if the recipe is not one of
            `rl: edpo`.
    """
    # axolotl would write its log into the folder of a finished run
    with (
        TemporaryDirectory() as folder,
        _quietly(),
        _same_environment(),
        without_engine(),
    ):
        cfg = _load(recipe, folder)
        cfg.is_preprocess = None  # data that are prepared already are not prepared anew
        if cfg.trainer_cls != TRAINER:
            raise ValueError(
                f"`axolotl {command}` takes recipes with `rl: edpo`, and this is "
                "another one"
            )
        yield cfg


def keys_of(recipe: str) -> dict[str, Any]:
    """The keys of a recipe as they are written.

    Args:
        recipe: Path of the YAML file.

    Raises:
        ValueError: If the file is no YAML, or holds no keys.
    """
    try:
        keys = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is no YAML: {_one_line(error)}") from None
    if not isinstance(keys, dict):
        raise ValueError(f"{recipe} holds no keys: a recipe has lines like `rl: edpo`")
    return keys


def _load(recipe: str, folder: str) -> Any:
    base_model = keys_of(recipe).get("base_model")
    try:
        # `is_preprocess`: the checks of this machine's GPUs are left out
        return load_cfg(recipe, output_dir=folder, is_preprocess=True)
    except OSError as error:
        if error.errno is not None:  # not of transformers, which found no config
            raise
        raise ValueError(
            f"{quote('base_model', base_model)}: its config was not found. "
            f"{_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the log to warnings, without those about the data."""
    loggers = logging.getLogger(), logging.getLogger("axolotl")
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(_is_news)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_news)


@contextmanager
def _same_environment() -> Iterator[None]:
    """Puts back the environment variables that a recipe sets."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to show it; `inspection/counts.py` repeats what is said of the data."""
    repeated = record.name.startswith("axolotl_edpo.data")
    return record.levelno >= logging.WARNING and not repeated
