"""docs/compatibility.md says what the cells of the matrix say."""

from pathlib import Path

import matrix


def test_the_document_is_what_the_cells_say():
    assert matrix.DOCUMENT.read_text() == matrix.document(), (
        "docs/compatibility.md is out of date: run `python tests/matrix.py`"
    )


def test_every_area_is_in_the_document():
    files = Path(__file__).parent.glob("test_matrix_*.py")
    assert {file.stem.removeprefix("test_matrix_") for file in files} == set(
        matrix.AREAS
    )
