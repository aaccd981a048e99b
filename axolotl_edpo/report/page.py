"""The page: a template filled with charts and tables, and files that appear whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import content, figures, runs, tables
from .content import Chart, Pairs
from .runs import Run

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """Runs with their names and, where there is one, their trace."""

    runs: list[Run]
    names: list[str]
    pairs: list[Pairs | None]


@dataclass(frozen=True)
class Section:
    """A part of the page; with tables, where it is of pairs."""

    title: str
    charts: list[Chart]
    pairs: Pairs | None = None


def read(paths: Sequence[Path]) -> Report:
    """Reads all that a report is about.

    Args:
        paths: Output directories or checkpoints, each counted once.

    Raises:
        ValueError: Names the path that is no run, and what to do.
    """
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    found = [runs.read_run(path) for path in once.values()]
    return Report(found, runs.names(found), [content.read_pairs(run) for run in found])


def as_json(report: Report) -> dict[str, Any]:
    """All numbers of a report."""
    each = zip(report.runs, report.names, report.pairs, strict=True)
    return {"runs": [content.as_json(*one) for one in each]}


def write(report: Report, folder: Path) -> tuple[Path, int]:
    """Writes the page and its pictures; the page last, each file whole.

    Args:
        report: What to show.
        folder: Made if need be; files of the same names are replaced.

    Returns:
        The page's path and the number of pictures.

    Raises:
        ValueError: The folder cannot be written to.
    """
    sections = _sections(report)
    pictures = [chart for section in sections for chart in section.charts]
    text = _render(report, sections)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in pictures:
            _replace(folder / f"{chart.name}.png", figures.as_png(chart.figure))
        _replace(folder / "index.html", text.encode())
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}: name another `--out`") from error
    return folder / "index.html", len(pictures)


def _replace(file: Path, data: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(data)
    partial.replace(file)


def _sections(report: Report) -> list[Section]:
    """Curves, then the pairs of each run that traced them."""
    several = len(report.runs) > 1
    if several:
        curves = content.charts_of_runs(report.runs, report.names)
    else:
        curves = content.charts_of_run(report.runs[0])
    sections = [Section("Curves", [*curves])]
    for number, pairs in enumerate(report.pairs):
        if pairs:
            title = f"Pairs of {report.names[number]}" if several else "Pairs"
            charts = content.charts_of_pairs(pairs, f"_{number + 1}" if several else "")
            sections.append(Section(title, [*charts], pairs))
    return sections


def _render(report: Report, sections: list[Section]) -> str:
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["svg"] = _svg
    return made.get_template("page.html").render(
        report=report,
        sections=sections,
        looks=figures.looks(len(report.runs)),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        tables=tables,
        status=runs.status,
    )


def _svg(chart: Chart) -> Markup:
    """The drawing of a chart; matplotlib has escaped its texts."""
    return Markup(figures.as_svg(chart.figure, chart.name))
