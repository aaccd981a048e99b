"""ε-DPO for axolotl: `rl: edpo`.

Files, in reading order:
    loss.py        the paper's equations on per-pair tensors
    loss_types.py  the losses of `dpo_loss_type`, with a β per pair
    controller.py  β: observed per micro-batch, moved per optimizer step
    head.py        a linear head, plain, quantized or under LoRA, and its products
    tiles.py       sums over one tile of the vocabulary, in PyTorch
    kernels.py     the same in Triton
    logprobs.py    the op: log-probabilities and perturbations, tile by tile
    batch.py       rows of pairs, padded or packed, and which positions are scored
    attention.py   attention over a packed row
    collator.py    TRL's collator, and the rows made of what it returns
    engine.py      what DDP, DeepSpeed and FSDP2 ask of the walk
    backbone.py    hidden states and heads of policy and reference
    router.py      the router loss of a mixture of experts
    metrics.py     weighted means, reduced over ranks once per log
    saved.py       which checkpoint directories are complete
    checkpoint.py  which one to resume, and what else is in it
    pairs.py       pairs that cannot be trained on, or teach nothing
    guard.py       numbers that are not finite stop a run
    rows.py        how a recipe wants its rows, and whether its model can
    feed.py        the trainer's data side: every pair once, in rows
    store.py       hidden states on disk, in files that check themselves
    identity.py    which reference they are of
    precompute.py  the pass that fills them, on all ranks
    reference.py   the trainer's reference: a model, a switched-off adapter, a cache
    trace.py       what every pair did, on disk
    run.py         the trainer's state: β, checkpoints, the stop
    margins.py     the margins of a step before its losses, for β-DPO
    trainer.py     the walk from a batch to the loss
    versions.py    the releases this was tested with
    args.py        the options of the recipe
    entries.py     what an entry of `datasets:` may hold
    spelling.py    keys that nobody knows
    recipe.py      what is refused before a model is loaded
    errors.py      how a recipe is refused
    plugin.py      what axolotl calls
    memory.py      memory per GPU, by calculation
    schema.py      the JSON schema of a recipe, for editors
    report/        what runs did, as a page: its own list of files
"""

from typing import Any

__all__ = ["EDPOPlugin"]


def __getattr__(name: str) -> Any:
    """The plugin on demand: the op and the loss need no axolotl."""
    if name != "EDPOPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .plugin import EDPOPlugin

    return EDPOPlugin
