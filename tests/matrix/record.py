"""Writes docs/compatibility.md: run it under every release, see helpers/matrix.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import matrix  # noqa: E402

if __name__ == "__main__":
    matrix.write()
