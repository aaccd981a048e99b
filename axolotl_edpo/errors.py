"""Errors that refuse a recipe: one line with key, value and remedy."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn


def refuse(key: str, value: Any, remedy: str) -> NoReturn:
    """Refuses a recipe that would not train as written.

    Args:
        key: The key, as it is in the YAML.
        value: Its value, as the YAML loader returns it.
        remedy: What to set instead, or the reason.

    Raises:
        ValueError: Always.
    """
    line = f"{quote(key, value)} does not work with `rl: edpo`: {remedy}"
    raise ValueError(line)


def quote(key: str, value: Any) -> str:
    """A key and its value in backquotes, as a user would write them in the recipe."""
    return f"`{key}: {as_yaml(value)}`"


def as_yaml(value: Any) -> str:
    """A value as YAML writes it on one line.

    Args:
        value: A scalar, a list or a mapping.

    Returns:
        `true`, `null`, `.inf`, `[a, b]` or `{a: 1}`; strings without quotes.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("inf", ".inf").replace("nan", ".nan")
    if isinstance(value, Mapping):
        entries = (f"{as_yaml(key)}: {as_yaml(value[key])}" for key in value)
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value)
