"""A mark for tests that put tensors on a GPU by name only, so that none is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def names_a_gpu() -> bool:
    """Whether a fake tensor on a GPU can be indexed where there is no GPU.

    A CPU build of torch 2.11 cannot.
    """
    with FakeTensorMode():
        try:
            return torch.empty(2, device="cuda")[:, None].shape == (2, 1)
        except RuntimeError:
            return False


needs_named_gpu = pytest.mark.skipif(
    not names_a_gpu(), reason="needs torch 2.13, or a GPU"
)
