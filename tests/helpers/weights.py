"""Weights that a run saved."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in an output folder, by name: the adapter's if there is one."""
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(folder / name for name in names if (folder / name).exists()))


def assert_same_weights(folder: Path, expected: Path) -> None:
    """Two runs saved the same weights, to 1e-6."""
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)
