"""`axolotl edpo-memory RECIPE`."""

import click


@click.command("edpo-memory")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Number of GPUs.  [default: `context_parallel_size` x `dp_shard_size` x "
    "`dp_replicate_size`; without them 8 for a recipe with `deepspeed:` or "
    "`fsdp_config:`, else 1]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    help="Tokens of a micro-batch, of chosen and rejected, with padding.  [default: "
    "the most it can have, `micro_batch_size` x 2 x `sequence_len`]",
)
def edpo_memory(recipe: str, gpus: int | None, tokens: int | None) -> None:
    """Show how much memory per GPU RECIPE takes, and which GPUs it fits.

    It is calculated: no weights are loaded, only the config of `base_model`, and no
    data are prepared. A GPU is not needed.
    """
    from ..recipe import config_of  # with axolotl
    from .page import lines
    from .recipe_memory import recipe_memory

    try:
        with config_of(recipe, "edpo-memory") as cfg:
            found = recipe_memory(cfg, gpus, tokens)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(lines(found)))
