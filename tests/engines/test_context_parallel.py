"""Ranks that divide a row among them train as one process does.

A group of `context_parallel_size` ranks is one data rank, so a step has as many pairs
as in one process.
"""

import pytest
from helpers import tiny
from helpers.engine_runs import PACKED, Runs, assert_same_run, assert_same_weights
from helpers.engines import series
from helpers.tiers import first
from helpers.tiny import LORA

UNSHARED = {"edpo_prefix_sharing": False}
# engine, ranks, ranks of a group
GROUPS = [("ddp", 2, 2), ("fsdp2", 2, 2), ("fsdp2", 4, 2), ("ddp", 4, 4)]


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    return Runs(parts, tmp_path_factory.mktemp("context"))


def divided(runs, name: str, count: int, size: int, **keys) -> list[dict]:
    """On several ranks, of which so many divide a row; a step of 8 pairs in all."""
    groups = count // size
    keys |= dict(context_parallel_size=size, gradient_accumulation_steps=4 // groups)
    if groups > 1:
        keys["dp_shard_size"] = groups
    return runs.many(name, count, **keys)


def assert_same(ranks: list[dict], single: list[dict]) -> None:
    """β of all ranks to the last bit, and the run of one process."""
    assert len(series(single[0], "loss")) == 10 and single[0]["beta"] != 0.1
    for other in ranks[1:]:
        assert_same_run([ranks[0], other], single)
    assert_same_weights(ranks, single, atol=1e-6)


@pytest.mark.parametrize("rows", first([{}, UNSHARED]), ids=["shared", "unshared"])
@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
@pytest.mark.parametrize(("name", "count", "size"), first(GROUPS))
def test_ranks_that_divide_rows_train_as_one(runs, name, count, size, adapter, rows):
    keys = dict(**PACKED, **adapter, **rows)
    assert_same(divided(runs, name, count, size, **keys), runs.single(**keys))
