"""Where things are."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
DATA, ROOT = TESTS / "data", TESTS.parent
