"""`axolotl edpo-score RECIPE`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .score import Scores

HEAD = ("", "pairs", "accuracy", "margin", "chosen", "rejected", "KL/token", "loss")


@click.command("edpo-score")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--model",
    type=click.Path(file_okay=False, path_type=Path),
    help="What was trained: a folder with whole weights or an adapter, an `output_dir` "
    "or a checkpoint.  [default: `output_dir` of RECIPE]",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a row per pair to this Parquet file.",
)
@click.option(
    "--split",
    default="test_datasets",
    show_default=True,
    type=click.Choice(["datasets", "test_datasets"]),
    help="Training or evaluation pairs.",
)
@click.option(
    "--launcher",
    default="python",
    show_default=True,
    type=click.Choice(["python", "accelerate", "torchrun"]),
    help="`python` is one process. What follows `--` goes to the others.",
)
@click.argument("launcher_args", nargs=-1, type=click.UNPROCESSED)
def edpo_score(
    recipe: str,
    model: Path | None,
    output: Path | None,
    split: str,
    launcher: str,
    launcher_args: tuple[str, ...],
) -> None:
    """Score pairs of RECIPE with a trained model, against its reference.

    Rewards have the last β of the run. The reference is the model below the adapter, or
    `base_model` after all weights were trained.
    """
    if launcher != "python":
        options = {"model": model, "output": output, "split": split}
        sys.exit(_launch(launcher, launcher_args, recipe, options))
    if launcher_args:
        raise click.UsageError(f"`--launcher python` takes no {launcher_args[0]}")
    from . import score  # with axolotl and TRL

    try:
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
        scores = score.score(recipe, model, split, output)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo()  # ends the line of the progress bar
        click.echo("\n".join(lines(scores)))
        if output:
            click.echo(f"Wrote {output}: {scores.sets[0]['pairs']} pairs.")


def _launch(
    launcher: str, words: tuple[str, ...], recipe: str, options: dict[str, Any]
) -> int:
    """Starts this command on several ranks, as `axolotl evaluate` starts itself."""
    from axolotl.cli.main import LAUNCHER_COMMAND_MAPPING
    from axolotl.cli.utils import build_command

    start = [*LAUNCHER_COMMAND_MAPPING[launcher], *words]
    command = [*start, "-m", "axolotl_edpo.scores", recipe]
    return subprocess.run(build_command(command, options)).returncode


def lines(scores: "Scores") -> list[str]:
    """The table of scores, and lines that say of what.

    Args:
        scores: Of one or several sets.
    """
    beta_of = scores.beta_of or "the recipe, as the model's folder holds none"
    rows = [[one["name"] or "all", f"{one['pairs']}"] for one in scores.sets]
    for row, one in zip(rows, scores.sets, strict=True):
        values = [one[key] for key in list(one)[2:]]
        row += ["–" if value is None else f"{value:.4f}" for value in values]
    table = [HEAD, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    printed = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]
    return [
        f"{scores.model}: pairs of `{scores.split}`",
        f"β = {scores.beta:.6g}, of {beta_of}",
        *printed,
    ]
