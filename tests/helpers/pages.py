"""README.md and docs/: their fenced blocks and the commands on them."""

import re
from pathlib import Path

from helpers.paths import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    """The path of a page, from the root of the checkout."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, without indentation."""
    found = FENCE.findall(path.read_text())
    return [
        re.sub(f"(?m)^{i}", "", text) for i, kind, text in found if kind in languages
    ]


def commands() -> list[tuple[str, list[str]]]:
    """The lines of all blocks for a shell: the page, and the words without comments."""
    return [
        (name(path), line.split("#")[0].split())
        for path in PAGES
        for text in blocks(path, "bash")
        for line in text.splitlines()
    ]
