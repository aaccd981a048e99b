"""What `make test` leaves to `make test-rest`: see docs/contributing.md."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

rest = pytest.mark.rest


def only(values: Sequence, is_first: Callable[..., bool]) -> list[Any]:
    """Parameters of which `make test` takes a part.

    Args:
        values: What `pytest.mark.parametrize` takes.
        is_first: Whether `make test` takes a value, or a tuple of values.
    """
    return [value if is_first(value) else _rest(value) for value in values]


def first(values: Sequence, count: int = 1) -> list[Any]:
    """Parameters of which `make test` takes the first ones."""
    return [*values[:count], *map(_rest, values[count:])]


def _rest(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=rest)
