"""Fills the template of the page with charts and tables, and writes the files."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import content, figures, runs, tables
from .content import Chart, Pairs, Scored
from .runs import Run

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """The content of a page.

    Attributes:
        runs: The runs.
        names: A name for each run.
        pairs: The traced pairs of each run; None for a run without a trace.
        scores: The scores of each run.
    """

    runs: list[Run]
    names: list[str]
    pairs: list[Pairs | None]
    scores: list[list[Scored]]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        charts: Its charts.
        pairs: Pairs to show in tables, or None.
        scored: The scores of these pairs, or None.
    """

    title: str
    charts: list[Chart]
    pairs: Pairs | None = None
    scored: Scored | None = None


def read(paths: Sequence[Path]) -> Report:
    """Reads runs and their traces.

    Args:
        paths: Output directories or checkpoints. Duplicates are read once.

    Raises:
        ValueError: If a path is not a run, or a trace is damaged; names the path and
            the remedy.
    """
    distinct: dict[Path, Path] = {}
    for path in paths:
        distinct.setdefault(path.resolve(), path)
    several = [runs.read_run(path) for path in distinct.values()]
    pairs = [content.read_pairs(run) for run in several]
    scores = [content.read_scores(run) for run in several]
    return Report(several, runs.names(several), pairs, scores)


def as_json(report: Report) -> dict[str, Any]:
    """All numbers of a report, for JSON."""
    parts = report.runs, report.names, report.pairs, report.scores
    return {"runs": [content.as_json(*run) for run in zip(*parts, strict=True)]}


def write(report: Report, folder: Path) -> tuple[Path, int]:
    """Writes the pictures, then the page.

    Args:
        report: The content.
        folder: Is created if it does not exist. Files with the same names are replaced.

    Returns:
        The path of the page, and the number of pictures.

    Raises:
        ValueError: If the folder cannot be written to.
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
    """Writes to a temporary file and renames it, so no reader sees a partial file."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(data)
    partial.replace(file)


def _sections(report: Report) -> list[Section]:
    """A section of curves, one of pairs for each run with a trace, then of scores."""
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
    return sections + [*_sections_of_scores(report)]


def _sections_of_scores(report: Report) -> Iterator[Section]:
    """A section for each file of scores."""
    for run, scores in enumerate(report.scores):
        of_run = f" of {report.names[run]}" if len(report.runs) > 1 else ""
        for number, scored in enumerate(scores):
            chart = content.chart_of_ratios(scored.pairs, f"scores_{run + 1}_{number}")
            title = f"Scores{of_run}: {scored.name}"
            yield Section(title, [chart], scored.pairs, scored)


def _render(report: Report, sections: list[Section]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": _svg, "png": _png}
    return environment.get_template("page.html").render(
        report=report,
        sections=sections,
        looks=figures.looks(len(report.runs)),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        tables=tables,
        status=runs.status,
    )


def _png(file: bytes) -> str:
    """A picture as an address that holds it, so that the page is one file."""
    return f"data:image/png;base64,{b64encode(file).decode()}"


def _svg(chart: Chart) -> Markup:
    """The chart as SVG. It is safe as markup: matplotlib has escaped its texts."""
    return Markup(figures.as_svg(chart.figure, chart.name))
