"""context_rules.py: which rows and ranks cannot be divided."""

from types import SimpleNamespace

import pytest
from helpers.releases import needs_divided_rows

from axolotl_edpo.config import context_rules
from axolotl_edpo.config.context_rules import check_ranks
from axolotl_edpo.config.validate import check_recipe

pytestmark = needs_divided_rows

DIVIDED = {"rl": "edpo", "sample_packing": True, "context_parallel_size": 2}
BLOCK = {"rl": "edpo", "sample_packing": True}
BLOCK_SIZE = {"context_parallel_size": None, "context_parallel": {"size": 2}}
WRONG = [
    (
        {"sample_packing": None},
        "`context_parallel_size: 2`.*set `sample_packing: true`",
    ),
    (
        {**BLOCK_SIZE, "sample_packing": None},
        "`context_parallel.size: 2`.*set `sample_packing: true`",
    ),
    ({"sample_packing": False}, "`context_parallel_size: 2`.*set `sample_packing"),
    ({"sample_packing": "auto"}, "`sample_packing: auto`.*set true: .*divide a packed"),
    ({"eval_sample_packing": False}, "`eval_sample_packing: false`.*remove it"),
    ({"deepspeed": "a.json"}, "`context_parallel_size: 2`.*in place of `deepspeed:`"),
    ({"use_ray": True, "ddp": True}, "`context_parallel_size: 2`.*remove `use_ray`"),
    ({"processor_type": "AutoProcessor"}, "`processor_type: AutoProcessor`.*remove it"),
    ({"is_multimodal": True}, "`is_multimodal: true`.*remove it"),
    ({"context_parallel_size": 0}, "`context_parallel_size: 0`.*greater than 0"),
    ({"sequence_parallel_degree": 2}, "`sequence_parallel_degree: 2`.*`context_par"),
]
BLOCKS = [
    ({"size": 2, "backend": "ring"}, "`context_parallel.backend: ring`.*Ulysses"),
    ({"size": 4, "ring_size": 2}, "`context_parallel.ring_size: 2`.*remove it"),
    ({"size": 4, "ulysses_size": 2}, "`context_parallel.ulysses_size: 2`.*remove it"),
    ({"size": 2, "load_balance": "head_tail"}, "`context_parallel.load_balance: head"),
    ({"size": 2, "rotate_method": "alltoall"}, "`context_parallel.rotate_method: all"),
    ({"size": "no"}, "`context_parallel.size: no`.*integer"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG)
def test_a_recipe_whose_rows_cannot_be_divided_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(DIVIDED | keys)


@pytest.mark.parametrize(("block", "message"), BLOCKS)
def test_the_block_of_axolotl_means_ulysses(block, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(BLOCK | {"context_parallel": block})


@pytest.mark.parametrize(
    "keys",
    [
        DIVIDED,
        {**DIVIDED, "sample_packing": None, "dpo_padding_free": True},
        {**BLOCK, "context_parallel": {"size": 4, "backend": "auto", "ring_size": 1}},
        {**BLOCK, "context_parallel": {"size": 4, "ulysses_size": 4}},
        {**DIVIDED, "use_ray": True, "fsdp_version": 2, "fsdp_config": {"a": 1}},
        {"rl": "edpo", "context_parallel_size": 1, "deepspeed": "a.json"},
    ],
)
def test_a_recipe_of_divided_rows_is_accepted(keys, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    if "deepspeed" in keys:
        keys = {**keys, "deepspeed": str(tmp_path / "a.json")}
    check_recipe(keys)


def test_an_axolotl_without_the_mesh_is_refused(monkeypatch):
    monkeypatch.setattr(context_rules, "has_context_parallelism", lambda: False)
    with pytest.raises(ValueError, match="size: 2`.*install axolotl 0.20 or later"):
        check_recipe(DIVIDED)


def launched(ranks: int, size: int | None, **keys) -> SimpleNamespace:
    base = dict(dp_shard_size=None, dp_replicate_size=None, fsdp_config=None)
    base |= dict(world_size=ranks, context_parallel_size=size)
    return SimpleNamespace(**{**base, **keys})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (launched(3, 2), "`context_parallel_size: 2` with 3 GPUs.*set a divisor"),
        (
            launched(1, 2),
            "`context_parallel_size: 2` in a run of one process: remove it",
        ),
        (launched(4, 2), "without `fsdp_config:`.*size: 4`.*`dp_shard_size: 2`"),
        (
            launched(4, 2, dp_shard_size=2),
            "without `fsdp_config:`.*set `context_parallel_size: 4` alone, or",
        ),
        (launched(4, 2, fsdp_config={"a": 1}), "4 GPUs: set `dp_shard_size: 2`"),
        (
            launched(8, 2, fsdp_config={"a": 1}, dp_shard_size=2),
            "8 GPUs: set `dp_shard_size: 4`",
        ),
        (
            launched(8, 2, fsdp_config={"a": 1}, dp_replicate_size=2),
            "remove `dp_replicate_size: 2` and set `dp_shard_size: 4`",
        ),
    ],
)
def test_ranks_that_make_no_whole_groups_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        check_ranks(cfg)


@pytest.mark.parametrize(
    "cfg",
    [
        launched(3, None),
        launched(3, 1),
        launched(4, 4),
        launched(2, 2, fsdp_config={"a": 1}),
        launched(8, 2, fsdp_config={"a": 1}, dp_shard_size=2, dp_replicate_size=2),
    ],
)
def test_whole_groups_are_accepted(cfg):
    check_ranks(cfg)
