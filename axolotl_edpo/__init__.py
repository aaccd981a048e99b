"""ε-DPO for axolotl: `rl: edpo`.

Imports run downwards (docs/architecture.md):
    inspection/, scores/, tools/
                            `axolotl edpo-inspect`, `edpo-score`, `edpo-memory`
    recipe.py               a recipe as `axolotl train` reads it
    plugin.py, trainer.py   what axolotl calls, and the trainer that it makes
    training/               the parts of a training run
    reference/              the reference's hidden states: computed or cached
    models/, config/        what is read of transformers models; checks of recipes
    data/, losses/          pairs and their layout in batches; losses and β
    report/                 `axolotl edpo-report`
    ops/, distributed.py    the fused op; DDP, DeepSpeed, FSDP2
    upstream.py, upstream_data.py
                            private and moving names of axolotl and its libraries
    errors.py, run_files.py, background.py
                            messages; files of a run; threads and copies
"""

from typing import Any

__all__ = ["EDPOPlugin"]


def __getattr__(name: str) -> Any:
    """Imports the plugin on first use, so that op and losses work without axolotl."""
    if name != "EDPOPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .plugin import EDPOPlugin

    return EDPOPlugin
