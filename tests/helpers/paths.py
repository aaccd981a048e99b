"""Folders of the repository."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
DATA = TESTS / "data"
ROOT = TESTS.parent
