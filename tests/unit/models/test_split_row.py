"""split_row.py in one process: heads by hand, and the refusals.

`tests/engines/test_context_parallel.py` runs it on ranks.
"""

import pytest
import torch

from axolotl_edpo.data.segments import Segments
from axolotl_edpo.distributed import RowGroup
from axolotl_edpo.models.split_row import (
    SplitRow,
    gather_stats,
    gather_tokens,
    head_copies,
    row_inputs,
)
from axolotl_edpo.ops.token_stats import TokenStats


@pytest.mark.parametrize(
    ("heads", "key_heads", "ranks", "copies"),
    [
        (32, 8, 8, 1),
        (32, 8, 16, 2),
        (32, 8, 32, 4),
        (4, 2, 4, 2),
        (12, 4, 3, 3),  # 12 key heads: 4 for each rank
        (12, 6, 4, 2),  # 12 key heads: 3 for each rank
        (24, 8, 6, 3),
        (16, 16, 4, 1),
    ],
)
def test_key_heads_are_copied_as_often_as_ranks_need(heads, key_heads, ranks, copies):
    assert head_copies(heads, key_heads, ranks) == copies
    assert key_heads * copies % ranks == 0 and heads % (key_heads * copies) == 0


def test_heads_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match="28 attention heads .* 8 ranks"):
        head_copies(28, 4, 8)


def test_attention_with_a_value_per_head_is_refused():
    row = SplitRow(Segments((4,), (4,), ((0,),)), RowGroup(2, 0))
    states = [torch.zeros(1, 2, 2, 4)] * 3
    with pytest.raises(ValueError, match="a value per head"):
        row.attend(None, torch.nn.Module(), *states, s_aux=torch.zeros(2))


def test_a_rank_that_has_its_row_alone_exchanges_nothing():
    alone, values = RowGroup(), torch.ones(3)
    stats = TokenStats(*[values] * len(TokenStats._fields))
    assert gather_tokens(values, {}, alone) is values
    assert gather_stats(stats, {}, alone) is stats
    segments = Segments((3,), (3,), ((0,),))
    assert row_inputs({"segments": segments}, alone)["segments"] is segments
