"""`axolotl edpo-inspect RECIPE`."""

import os
import sys

import click

# Notes that a pair may have; `pair_set.py` finds the pairs.
NOTES = ("any", "template", "merged", "repeated", "left out", "truncated", "same")


@click.command("edpo-inspect")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--pairs",
    default=3,
    show_default=True,
    type=click.IntRange(min=0),
    help="How many pairs are shown, from the first on.",
)
@click.option(
    "--note",
    type=click.Choice(NOTES),
    help="Show pairs that have this note only: the chat template writes another text "
    "than `rl: dpo` trains, prompt and answer share a token, the prompt began with "
    "what the tokenizer adds, the template leaves something out, `sequence_len` "
    "truncates an answer, both answers are the same.",
)
@click.option(
    "--split",
    "key",
    default="datasets",
    show_default=True,
    type=click.Choice(["datasets", "test_datasets"]),
    help="Training or evaluation pairs.",
)
@click.option("--tokens", is_flag=True, help="List tokens with their ids, one a line.")
@click.option(
    "--color/--no-color",
    default=None,
    help="With colours or with signs.  [default: colours on a terminal, unless "
    "NO_COLOR is set]",
)
def edpo_inspect(
    recipe: str,
    pairs: int,
    note: str | None,
    key: str,
    tokens: bool,
    color: bool | None,
) -> None:
    """Show pairs of RECIPE as they will be trained, and counts of all of them.

    No model is loaded. The data are prepared as `axolotl preprocess` does.
    """
    from . import counts, marks, pages, pair_set  # with axolotl and TRL

    try:
        found = pair_set.load(recipe, key)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    style = marks.Coloured() if color else marks.Plain()
    page = pages.Page(found, style, tokens)
    click.echo("\n".join(page.lines(note, pairs)), color=color)
    click.echo("\n".join(counts.lines(found)), color=color)
