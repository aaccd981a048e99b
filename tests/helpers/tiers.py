"""What `make test` leaves to `make test-rest`: see docs/contributing.md."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

rest = pytest.mark.rest


def only(values: Sequence, is_first: Callable[..., bool]) -> list[Any]:
    """Parameters of which `make test` takes a part.

    Args:
        values: What `pytest.mark.parametrize` takes.
        is_first: Whether `make test` takes a value; it gets a tuple as arguments.
    """
    return [v if is_first(*_tuple(v)) else _rest(v) for v in values]


def first(values: Sequence, count: int = 1) -> list[Any]:
    """Parameters of which `make test` takes the first ones."""
    return [*values[:count], *map(_rest, values[count:])]


def _rest(value: Any) -> Any:
    return pytest.param(*_tuple(value), marks=rest)


def _tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)
