"""ε-DPO for axolotl: `rl: edpo`.

Files, in reading order:
    loss.py        the paper's equations on per-pair tensors
    controller.py  β: observed per micro-batch, advanced per optimizer step
    logprobs.py    the head: log-probabilities and perturbations, in chunks
    batch.py       which positions of a batch are scored
    backbone.py    hidden states and heads of policy and reference
    metrics.py     weighted means, reduced over ranks once per log
    checkpoint.py  which checkpoint directories are complete
    trainer.py     the walk from a batch to the loss
    versions.py    the releases this was tested with
    args.py        the options of the recipe
    plugin.py      what axolotl calls
"""

from .plugin import EDPOPlugin

__all__ = ["EDPOPlugin"]
