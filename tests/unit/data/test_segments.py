"""segments.py: what the layers of a batch share, and for how long."""

import weakref

import torch

from axolotl_edpo.data.segments import Segments


def test_a_mask_is_made_once_for_all_layers_and_freed_with_its_batch():
    segments = Segments((2,), (2,), ((0,),))
    masks = [segments.once("causal", lambda: torch.ones(2, 2)) for _ in range(2)]
    assert masks[0] is masks[1]
    freed = weakref.ref(masks[0])
    masks.clear()
    assert freed() is not None
    segments.clear_cache()
    assert freed() is None
