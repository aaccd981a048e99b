"""Tests that name a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def names_a_gpu() -> bool:
    """Whether tensors may be on a GPU that is not there, by name and shape only.

    torch 2.11, built for processors only, does not index them.
    """
    with FakeTensorMode():
        try:
            return torch.empty(2, device="cuda")[:, None].shape == (2, 1)
        except RuntimeError:
            return False


needs_named_gpu = pytest.mark.skipif(
    not names_a_gpu(), reason="needs torch 2.13, or a GPU"
)
