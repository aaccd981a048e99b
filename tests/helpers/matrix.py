"""The compatibility matrix: cells that tests run, and docs/compatibility.md of them.

Every `tests/matrix/test_matrix_*.py` is an area. It has TITLE, INTRO and CELLS, and
tests that are parametrized over the cells with `cells`. The document says of a cell
what its test asserts. No cell is skipped: one that this hardware cannot run says so in
the document, and so does one of an option that the installed axolotl does not have.

Releases of axolotl differ. Each has a file with the verdicts of all cells, and the
document is written from these files:

    python tests/matrix/record.py      under each release, in any order
"""

import importlib
import importlib.metadata
import importlib.util
import json
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.schemas.config import AxolotlInputConfig

from axolotl_edpo.config.json_schema import recipe_schema
from helpers import tiers, tiny

TESTS = Path(__file__).parent.parent
DOCUMENT = TESTS.parent / "docs" / "compatibility.md"
RECORDS = TESTS / "data" / "compatibility"
# In the order of the document.
AREAS = (
    "models",
    "adapters",
    "losses",
    "data",
    "templates",
    "training",
    "examples",
    "errors",
)
HEAD = """\
# What works with `rl: edpo`

Made by `python tests/matrix/record.py` from the cells that `make test-all` runs: tiny
models, axolotl's own config loading, data loading and train loop, one or two optimizer
steps, two CPU cores. "Works" is a test that passed, "refused" a test that got the
message, and "untested" says what it would take.

{releases}
"""
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A line of the document, and what its test runs.

    Attributes:
        name: The option or the situation, in Markdown.
        keys: Keys that it adds to a recipe.
        refused: Regular expression of the message, if `rl: edpo` refuses it.
        untested: What is missing to run it; such a cell is in the document only.
        note: What a user should know; for a refused cell why it is refused.
        missing: `no such key` or `no such value`, if the installed axolotl lacks it.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    untested: str = ""
    note: str = ""
    missing: str = ""

    @property
    def verdict(self) -> str:
        """What the document says: works, refused, untested or missing."""
        if self.missing or self.untested:
            return self.missing or f"untested: {self.untested}"
        return "refused" if self.refused else "works"


def without(name: str, known: Collection[str] = AxolotlInputConfig.model_fields) -> str:
    """What `Cell.missing` says of a name.

    Args:
        name: A key, or a value of one.
        known: Fields of a schema, or the values that axolotl takes.

    Returns:
        "" if axolotl has it.
    """
    kind = "key" if isinstance(known, Mapping) else "value"
    return "" if name in known else f"no such {kind}"


def without_module(name: str) -> str:
    """What `Cell.missing` says of a plugin's key, given the plugin's module."""
    return "" if importlib.util.find_spec(name) else "no such key"


def cells(
    all_cells: Sequence[Cell], is_first: Callable[[Cell], bool] | None = None
) -> Callable:
    """A decorator that parametrizes a test over the cells that can run here.

    The test gets each as `cell`. Where there is none, the test is removed, as pytest
    would count it as skipped.

    Args:
        all_cells: The cells of the test.
        is_first: Whether `make test` runs a cell; without it, it runs all.
    """
    run = [cell for cell in all_cells if not (cell.untested or cell.missing)]
    if not run:
        return lambda test: None
    names = [cell.name.replace("`", "")[:60] for cell in run]
    chosen = tiers.only(run, is_first) if is_first else run
    return pytest.mark.parametrize("cell", chosen, ids=names)


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


def record() -> Record:
    """Verdicts and notes of all cells under the installed axolotl, and its options."""
    versions = {name: importlib.metadata.version(name) for name in ("axolotl", "trl")}
    verdicts = {name: _verdicts(_area(name).CELLS) for name in AREAS}
    return {**versions, "areas": verdicts, "options": sorted(options())}


def options() -> set[str]:
    """Every option of axolotl's schema, as `key` or as `Group.key`."""
    schema = recipe_schema()
    groups = {"": schema, **{f"{name}.": d for name, d in schema["$defs"].items()}}
    return {
        name + key
        for name, group in groups.items()
        for key in group.get("properties", ())
    }


def records() -> dict[str, Record]:
    """The record of each release by its name, such as `0.19`; the oldest is first."""
    files = sorted(RECORDS.glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def release() -> str:
    """The installed axolotl, as records name it."""
    return ".".join(importlib.metadata.version("axolotl").split(".")[:2])


def document(records: Mapping[str, Record]) -> str:
    """The text of docs/compatibility.md, made of the records.

    Raises:
        ValueError: If a record is of other cells than the installed release's.
    """
    installed = {name: [*_verdicts(_area(name).CELLS)] for name in AREAS}
    for old, kept in records.items():
        if {name: [*cells] for name, cells in kept["areas"].items()} != installed:
            raise ValueError(
                f"{RECORDS / old}.json has other cells: run `python "
                f"tests/matrix/record.py` under axolotl {old}"
            )
    sections = [_section(name, records) for name in AREAS]
    return "\n".join([_head(records), *sections])


def _area(name: str) -> Any:
    """The test file of an area; its folder is on the path, as pytest puts it there."""
    return importlib.import_module(f"test_matrix_{name}")


def _verdicts(all_cells: Sequence[Cell]) -> dict[str, str]:
    """Verdict and note of each cell as in the document, by the cell's name."""
    return {cell.name: f"{cell.verdict} | {cell.note}" for cell in all_cells}


def _head(records: Mapping[str, Record]) -> str:
    names = [f"{kept['axolotl']} (TRL {kept['trl']})" for kept in records.values()]
    text = f"Run under axolotl {', '.join(names)}; where they differ, a column each."
    return HEAD.format(releases=textwrap.fill(text, 88))


def _section(name: str, records: Mapping[str, Record]) -> str:
    """The table of an area."""
    area, by_release = _area(name), [kept["areas"][name] for kept in records.values()]
    rows = {c: [cells[c].split(" | ") for cells in by_release] for c in by_release[0]}
    differ = any(len({verdict for verdict, _ in row}) > 1 for row in rows.values())
    columns = [*records] if differ else [""]
    table = [
        f"| | {' | '.join(columns)} | why, or what to know |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for cell, row in rows.items():
        verdicts = " | ".join(verdict for verdict, _ in row[: len(columns)])
        notes = dict(zip(records, (note for _, note in row), strict=True))
        table.append(f"| {cell} | {verdicts} | {_note(notes)} |")
    return "\n".join([f"## {area.TITLE}", "", area.INTRO.strip(), "", *table, ""])


def _note(notes: Mapping[str, str]) -> str:
    """The note of a cell; where releases differ, each note after their names."""
    releases = {note: [r for r in notes if notes[r] == note] for note in notes.values()}
    if len(releases) == 1:
        return next(iter(releases))
    return "; ".join(f"{', '.join(r)}: {note}" for note, r in releases.items() if note)


def write() -> None:
    """Records the installed release and writes docs/compatibility.md.

    Raises:
        SystemExit: If another release was recorded with other cells; this one is kept.
    """
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps(record(), indent=1, ensure_ascii=False)
    (RECORDS / f"{release()}.json").write_text(text + "\n")
    try:
        DOCUMENT.write_text(document(records()))
    except ValueError as stale:
        raise SystemExit(f"axolotl {release()} is recorded; {stale}") from None
