"""docs/compatibility.md says what the cells of the matrix say, under every release."""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import matrix

OUTDATED = "out of date: run `python tests/matrix/record.py` under every release"
# Groups of options that came after the oldest release: the key with a cell that reads
# them; or why there is none.
GROUPS = {
    "DiffusionLMConfig": "diffusion_lm",
    "DiffusionUnrollConfig": "diffusion_lm",
    "ExportConfig": "export",
    "SelfConditioningConfig": "diffusion_lm",
}
UNTOLD = {
    "SyntheticDataset": "of supervised data",
    "mixlora": "`mixlora_*` has one cell",
}


def test_the_record_of_the_installed_release_is_what_its_cells_say():
    assert matrix.records()[matrix.release()] == matrix.record(), OUTDATED


def test_the_document_is_what_the_records_say():
    assert matrix.DOCUMENT.read_text() == matrix.document(matrix.records()), OUTDATED


def areas() -> list[Any]:
    return [importlib.import_module(f"test_matrix_{name}") for name in matrix.AREAS]


def test_every_area_is_in_the_document():
    files = Path(__file__).parent.glob("test_matrix_*.py")
    assert {file.stem.removeprefix("test_matrix_") for file in files} == set(
        matrix.AREAS
    )


@pytest.mark.parametrize("name", matrix.AREAS)
def test_a_name_is_of_one_cell(name):
    names = [cell.name for cell in importlib.import_module(f"test_matrix_{name}").CELLS]
    assert len({*names}) == len(names)


def keys_in(value: Any) -> Iterator[str]:
    """The keys of a recipe, at any depth."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield key
            yield from keys_in(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from keys_in(inside)


def test_every_option_that_is_new_since_the_oldest_release_has_a_cell():
    oldest = next(iter(matrix.records().values()))
    told = {
        key for area in areas() for cell in area.CELLS for key in keys_in(cell.keys)
    }
    untold = []
    for option in matrix.options() - {*oldest["options"]}:
        group, _, key = option.rpartition(".")
        known = GROUPS.get(group, key) in told or key in told
        if not known and not {group, key.partition("_")[0]} & UNTOLD.keys():
            untold.append(option)
    assert not untold


def test_releases_that_differ_have_a_column_each(monkeypatch):
    cells = [matrix.Cell("Llama"), matrix.Cell("new", note="now")]
    area = type("area", (), dict(TITLE="T", INTRO="I", CELLS=cells))
    monkeypatch.setattr(matrix, "AREAS", ("models",))
    monkeypatch.setattr(matrix, "_area", lambda name: area)

    def record(version: str, **new: str) -> dict:
        said = {"Llama": "works | ", "new": "works | now", **new}
        return {"axolotl": version, "trl": "1", "areas": {"models": said}}

    alike = matrix.document({"0.1": record("0.1.0"), "0.2": record("0.2.5")})
    assert "Run under axolotl 0.1.0 (TRL 1), 0.2.5 (TRL 1); where they" in alike
    assert "| new | works | now |" in alike
    old = record("0.1.0", new="no such key | now")
    differ = matrix.document({"0.1": old, "0.2": record("0.2.5")})
    assert "| | 0.1 | 0.2 | why, or what to know |" in differ
    assert "| new | no such key | works | now |" in differ
    old = record("0.1.0", new="refused | then")
    differ = matrix.document({"0.1": old, "0.2": record("0.2.5")})
    assert "| new | refused | works | 0.1: then; 0.2: now |" in differ
    stale = {"0.1": record("0.1.0", gone="works | "), "0.2": record("0.2.5")}
    with pytest.raises(
        ValueError, match=r"0.1.json has other cells: run .* axolotl 0.1"
    ):
        matrix.document(stale)
