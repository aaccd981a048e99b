"""The compatibility matrix: cells that tests run, and docs/compatibility.md of them.

Every `tests/test_matrix_*.py` is an area: TITLE, INTRO and CELLS, and tests that are
parametrized over the cells with `cells`. What the document says of a cell is what its
test asserts; nothing is skipped: a cell that this hardware cannot run says so.

    python tests/matrix.py      writes docs/compatibility.md
"""

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "compatibility.md"
# In the order of the document.
AREAS = (
    "models",
    "adapters",
    "losses",
    "data",
    "training",
    "examples",
    "errors",
)
HEAD = """\
# What works with `rl: edpo`

Made by `python tests/matrix.py` from the cells that `make test` runs: tiny models,
axolotl's own config loading, data loading and train loop, one or two optimizer steps,
two CPU cores. "Works" is a test that passed, "refused" a test that got the message, and
"untested" says what it would take. axolotl {axolotl}, TRL {trl}.
"""


@dataclass(frozen=True)
class Cell:
    """A line of the document, and what its test runs.

    Attributes:
        name: What a user writes or has; Markdown.
        keys: What it adds to a recipe.
        refused: Regular expression of the message, if `rl: edpo` refuses it.
        untested: What is missing to run it; such a cell is in the document only.
        note: What a user should know; for a refused cell why it is refused.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    untested: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.untested:
            return f"untested: {self.untested}"
        return "refused" if self.refused else "works"


def cells(all_cells: Sequence[Cell]) -> Callable:
    """Parametrizes a test over the cells that this hardware can run, as `cell`."""
    run = [cell for cell in all_cells if not cell.untested]
    names = [cell.name.replace("`", "")[:60] for cell in run]
    return pytest.mark.parametrize("cell", run, ids=names)


def assert_cell(cell: Cell, folder: Path, recipe: dict) -> Any:
    """Trains a cell's recipe for two steps, or asserts that it is refused.

    Returns:
        The trainer, or None where the recipe is refused.
    """
    if cell.refused:
        with pytest.raises(ValueError, match=cell.refused):
            tiny.train(folder, recipe)
        return None
    trainer = tiny.train(folder, {"max_steps": 2, **recipe})
    assert_trains(trainer)
    return trainer


def assert_trains(trainer: Any) -> None:
    """The first step finds policy and reference equal, the second does not."""
    first, second = tiny.logs(trainer)[:2]
    assert first["kl/p_epsilon_steps"] == first["kl/n_epsilon_steps"] == 0.0
    assert first["kl/policy_ref"] == first["rewards/margins"] == 0.0
    assert math.isfinite(second["loss"])
    assert second["kl/policy_ref"] > 0
    assert second["kl/p_epsilon_steps"] + second["kl/n_epsilon_steps"] > 0
    assert trainer.controller.beta != first["kl/beta"]


def document() -> str:
    """docs/compatibility.md, as the cells have it."""
    areas = [importlib.import_module(f"test_matrix_{name}") for name in AREAS]
    return "\n".join([_head(), *map(_section, areas)])


def _head() -> str:
    return HEAD.format(**{n: importlib.metadata.version(n) for n in ("axolotl", "trl")})


def _section(area: Any) -> str:
    rows = [f"| {c.name} | {c.verdict} | {c.note} |" for c in area.CELLS]
    head = ["| | | why, or what to know |", "|---|---|---|"]
    return "\n".join([f"## {area.TITLE}", "", area.INTRO.strip(), "", *head, *rows, ""])


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())
