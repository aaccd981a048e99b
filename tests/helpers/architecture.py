"""The picture in docs/architecture.md, drawn from the imports of the package.

python tests/helpers/architecture.py      draws it anew
"""

import re
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "architecture.md"
FRAME = re.compile(r"(<!-- picture -->\n).*?(<!-- /picture -->)", re.DOTALL)
Edges = set[tuple[str, str]]


def part(module: str) -> str:
    """The folder, or the file beside the folders, that a module is in."""
    _, *names = module.split(".")
    return names[0] if names else ""


def imports() -> Edges:
    """Which part of the package imports which."""
    graph = grimp.build_graph("axolotl_edpo", cache_dir=None)
    edges = {
        (part(module), part(imported))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return {(a, b) for a, b in edges if a and b and a != b}


def without_detours(edges: Edges) -> Edges:
    """The edges that do not follow from others; there is no circle."""

    def reached(start: str) -> set[str]:
        nearest = {b for a, b in edges if a == start}
        return nearest.union(*map(reached, nearest))

    return {
        (a, b)
        for a, b in edges
        if not any(b in reached(c) for start, c in edges if start == a and c != b)
    }


def picture() -> str:
    """The graph as Mermaid, which GitHub draws."""
    edges = sorted(without_detours(imports()))
    lines = [f"    {a} --> {b}" for a, b in edges]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def page() -> str:
    """docs/architecture.md with the picture as it is now."""
    return FRAME.sub(lambda frame: frame[1] + picture() + frame[2], PAGE.read_text())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
