"""Stands in for wandb, which axolotl imports and a benchmark does not use."""

__version__ = "0"
run = None


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
