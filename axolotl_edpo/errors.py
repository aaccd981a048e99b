"""How a recipe is refused: one line with key, value and remedy."""

from typing import Any, NoReturn


def refuse(key: str, value: Any, remedy: str) -> NoReturn:
    """Raises the ValueError of a recipe that would not train as written.

    Args:
        key: As it is in the YAML.
        value: As it is there.
        remedy: What to set instead, or why it cannot be.
    """
    raise ValueError(f"`{key}: {value}` does not work with `rl: edpo`: {remedy}")
