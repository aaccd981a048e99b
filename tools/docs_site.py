"""A hook of mkdocs: the site has README.md, and the files outside of docs/ with links.

Links on the pages are those of the repository, so that they work on GitHub, too. The
site has the same files in other places:

    README.md       index.md
    docs/NAME       NAME
    anything else   the same name
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# `[text](link)` and `![text](link)`: what is before, in and after the link.
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    """Adds pages of `nav` that are not in docs/, and all files that pages link to."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    pages += [ROOT / name for name in _names(config["nav"]) if (ROOT / name).exists()]
    linked = {target for page in pages for target in _targets(page)}
    for path in sorted({*pages, *linked}):
        uri = site_path(path)
        if path.is_file() and files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links between files of the repository into links on the site."""
    folder = repository_path(page.file.src_uri).parent
    start = PurePosixPath(page.file.src_uri).parent

    def moved(found):
        link = os.path.relpath(site_path((folder / found[2]).resolve()), start)
        return f"{found[1]}{link}{found[3] or ''}{found[4]}"

    return LINK.sub(moved, markdown)


def site_path(path: Path) -> str:
    """Where the site has a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


def repository_path(uri: str) -> Path:
    """The file of the repository that the site has at a place."""
    if uri == "index.md":
        return ROOT / "README.md"
    in_docs = ROOT / "docs" / uri
    return in_docs if in_docs.exists() else ROOT / uri


def _targets(page: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    text = CODE.sub("", page.read_text())
    paths = {(page.parent / found[2]).resolve() for found in LINK.finditer(text)}
    return {path for path in paths if path.is_file()}


def _names(nav) -> list[str]:
    """The pages of `nav`."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [name for entry in entries for name in _names(entry)]
