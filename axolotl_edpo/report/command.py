"""`axolotl edpo-report RUN [RUN ...]`."""

import json
from pathlib import Path
from typing import TextIO

import click

FOLDER = "edpo_report"


@click.command("edpo-report")
@click.argument("run", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the page and its pictures.  [default: edpo_report/ in RUN; of "
    "several runs, here]",
)
@click.option(
    "--json",
    "numbers",
    is_flag=False,
    flag_value="-",
    type=click.File("w", encoding="utf-8", lazy=True),
    metavar="[FILE]",
    help="Print all numbers, or write them to FILE, instead of a page. `axolotl` "
    "prints its banner first; to pipe them: python -m axolotl_edpo.report RUN --json",
)
def edpo_report(run: tuple[Path, ...], out: Path | None, numbers: TextIO | None):
    """Show what runs did: curves, KL against accuracy, doubtful pairs.

    RUN is the `output_dir` of a recipe or one of its checkpoints; several are compared.
    """
    from . import page  # with matplotlib and pandas

    try:
        report = page.read(run)
        if numbers:
            json.dump(page.as_json(report), numbers, indent=2, allow_nan=False)
            numbers.write("\n")
            return
        folder = out or (Path(FOLDER) if len(run) > 1 else run[0] / FOLDER)
        index, pictures = page.write(report, folder)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {index} and {pictures} pictures beside it.")
