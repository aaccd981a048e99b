"""`axolotl edpo-report` in this process: what it prints, its numbers, its page."""

import json
from html.parser import HTMLParser
from pathlib import Path

from click.testing import CliRunner

from axolotl_edpo.report.command import edpo_report

# Tags that have no end.
VOID = {"meta", "img", "br"}


def report(*words: object) -> str:
    """Runs the command with these words and returns what it printed."""
    result = CliRunner().invoke(edpo_report, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    """Runs the command, which must fail, and returns the one line that it printed."""
    result = CliRunner().invoke(edpo_report, [*map(str, words)])
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    return line


def numbers(tmp_path: Path, *paths: Path) -> list[dict]:
    """What `--json` writes of each run, by way of a file in a folder."""
    report(*paths, "--json", tmp_path / "numbers.json")
    return json.loads((tmp_path / "numbers.json").read_text())["runs"]


class Page(HTMLParser):
    """A page that was written.

    Args:
        folder: Where it is.

    Attributes:
        source: Its HTML, whose tags are balanced.
        texts: Each piece of text, and the tags around it from the outside in.
        attributes: Name and value of every attribute.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.source = (folder / "index.html").read_text(encoding="utf-8")
        self.open, self.texts, self.attributes = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        """Opens a tag."""
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        """Closes the tag that was opened last."""
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        """Keeps the attributes of a tag that closes itself."""
        self.attributes += attrs

    def handle_data(self, data):
        """Keeps a text with the tags around it."""
        if data.strip():
            self.texts.append((tuple(self.open), data.strip()))

    def text(self, within: str = "body") -> str:
        """All text in elements of a kind, a line per piece."""
        return "\n".join(text for tags, text in self.texts if within in tags)

    def rows(self) -> dict[str, str]:
        """Every cell of the tables of runs, by the cell before it."""
        cells = [text for tags, text in self.texts if {*tags} & {"th", "td"}]
        return dict(zip(cells, cells[1:], strict=False))


def page_of(folder: Path, *paths: Path) -> Page:
    """Writes the page of some runs to a folder."""
    report(*paths, "--out", folder)
    return Page(folder)


def observation(step: int, name: str, move: int | None, margin: float, **more) -> dict:
    """A row of a trace, with β̃ = 0.5 and 3, 5 and 7 tokens.

    Args:
        step: Optimizer step.
        name: Of the pair.
        move: s of Eq. 5; None under a control without it.
        margin: Implicit reward margin.
        **more: Columns that differ.
    """
    plus = None if move is None else 0.01 * move
    row = dict(global_step=step, id=name, plus=plus, minus=plus and -plus, step=move)
    row |= dict(beta=0.5, margin=margin, kl=0.25, prompt_tokens=3)
    row |= dict(chosen_tokens=5, rejected_tokens=7)
    return row | dict(prompt=None, chosen=None, rejected=None) | more
