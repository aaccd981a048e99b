"""Fails if an installation changed or removed a package that was there.

    pip freeze > before
    pip install ...
    pip freeze > after
    python tools/compare_freezes.py before after

New packages may come.
"""

import sys
from pathlib import Path

before, after = (Path(name).read_text().splitlines() for name in sys.argv[1:])
lost = [line for line in before if line not in after]
if lost:
    sys.exit("changed or removed: " + ", ".join(lost))
print(f"{len(before)} packages as before, {len(after) - len(before)} new")
