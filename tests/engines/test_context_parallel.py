"""Ranks that divide a row among them train as one process does.

A group of `context_parallel_size` ranks is one data rank, so a step has as many pairs
as in one process.
"""

from pathlib import Path

import pandas
import pytest
from helpers import ranks, tiny
from helpers.engine_runs import (
    PACKED,
    Runs,
    assert_same_beta,
    assert_same_evaluation,
    assert_same_run,
    assert_same_weights,
)
from helpers.engines import series
from helpers.releases import needs_divided_rows
from helpers.tiers import first, only, rest
from helpers.tiny import CACHED, LORA
from torch.multiprocessing import ProcessRaisedException
from transformers import LlamaModel

from axolotl_edpo.trainer import EDPOTrainer

pytestmark = needs_divided_rows

UNSHARED = {"edpo_prefix_sharing": False}
# engine, ranks, ranks of a group
GROUPS = [("ddp", 2, 2), ("fsdp2", 2, 2), ("fsdp2", 4, 2), ("ddp", 4, 4)]


@pytest.fixture(scope="session")
def parts(parts):
    """Those of the other tests, more models, and data of odd sizes."""
    folder = parts["model"].parent
    more = {
        f"{count} pairs": tiny.save_pairs(folder / f"{count}.jsonl", count)
        for count in (5, 33)
    }
    more["experts"] = tiny.save_model(folder / "experts", "mixtral", **tiny.EXPERTS)
    more["tied"] = tiny.save_model(folder / "tied", tie_word_embeddings=True)
    more["windows"] = tiny.save_model(folder / "windows", "mistral", sliding_window=16)
    return {**parts, **more}


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


def assert_same(every: list[dict], single: list[dict]) -> None:
    """β of all ranks to the last bit, and the run of one process."""
    assert len(series(single[0], "loss")) == 10 and single[0]["beta"] != 0.1
    for other in every[1:]:
        assert_same_run([every[0], other], single)
    assert_same_weights(every, single, atol=1e-6)


@pytest.mark.parametrize("rows", first([{}, UNSHARED]), ids=["shared", "unshared"])
@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
@pytest.mark.parametrize(("name", "count", "size"), first(GROUPS))
def test_ranks_that_divide_rows_train_as_one(runs, name, count, size, adapter, rows):
    keys = dict(**PACKED, **adapter, **rows)
    assert_same(divided(runs, name, count, size, **keys), runs.single(**keys))


def lengths(train):
    """The probe: the longest row that the body of the model got in a training step."""
    longest, forward, loss = [0], LlamaModel.forward, EDPOTrainer.compute_loss

    def run(self, input_ids, *args, **keywords):
        longest[0] = max(longest[0], input_ids.shape[1])
        return forward(self, input_ids, *args, **keywords)

    def begin(self, *args, **keywords):
        LlamaModel.forward = run
        return loss(self, *args, **keywords)

    EDPOTrainer.compute_loss = begin
    return train(), {"longest": longest[0]}


def test_each_rank_runs_its_part_of_a_row(runs):
    """Rows of one pair each, so that both runs have the same."""
    keys = dict(**PACKED, micro_batch_size=1, max_steps=2, num_epochs=None)
    keys["probe"] = "test_context_parallel:lengths"
    (alone,) = runs.single(**keys)
    pair = divided(runs, "ddp", 2, 2, **keys)
    assert [run["longest"] for run in pair] == [-(-alone["longest"] // 2)] * 2


OPTIONS = {
    "cached": CACHED,
    "cached lora": {**LORA, **CACHED},
    "two numbers": dict(edpo_control="fixed", edpo_epsilon=None, **CACHED),
    "batch margin": dict(
        edpo_control="batch_margin", edpo_epsilon=None, edpo_margin_keep=0.8
    ),
    "checkpointing": dict(gradient_checkpointing=True),
    "checkpointing lora": dict(**LORA, gradient_checkpointing=True),
    "reentrant": dict(
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    ),
    "padding-free": dict(sample_packing=None, dpo_padding_free=True),
    "windows": dict(model="windows"),
    "tied": dict(model="tied"),
    "unreadable head": dict(
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=["q_proj", "lm_head"],
        peft_use_dora=True,
    ),
    "sft": dict(dpo_loss_type=["sigmoid", "sft"]),
    "weighting": dict(dpo_use_weighting=True),
    "length terms": dict(dpo_ld_alpha=0.5, edpo_length_penalty=0.03),
    "simpo": dict(edpo_control="fixed", edpo_epsilon=None, dpo_loss_type=["simpo"]),
}
SHARDS = {**ranks.FSDP2, "transformer_layer_cls_to_wrap": "MistralDecoderLayer"}


@pytest.mark.parametrize(("name", "count"), first([("ddp", 2), ("fsdp2", 4)]))
@pytest.mark.parametrize("option", only(OPTIONS, lambda option: option == "cached"))
def test_options_change_nothing(runs, option, name, count, tmp_path):
    keys = {**PACKED, **OPTIONS[option]}
    alone = {key: value for key, value in keys.items() if key not in CACHED}
    single = runs.single(**alone)
    if CACHED.keys() <= keys.keys():
        keys["edpo_reference_cache"] = str(tmp_path / "cache")
    if option == "windows" and name == "fsdp2":
        keys["fsdp_config"] = SHARDS
    group = divided(runs, name, count, 2, **keys)
    assert_same_weights(group, single, atol=1e-6)
    for metric in ("loss", "rewards/margins", "grad_norm"):
        expected = pytest.approx(series(single[0], metric), rel=1e-3, abs=1e-5)
        for run in group:
            assert series(run, metric) == expected, metric
    if "kl/beta" in single[0]["log"][0]:
        for other in group[1:]:
            assert_same_beta([group[0], other])
        betas = pytest.approx(series(single[0], "kl/beta"), abs=1e-6)
        assert series(group[0], "kl/beta") == betas


@rest
def test_every_pair_counts_once_where_the_last_ones_are_too_few(runs):
    """33 pairs leave one for the last step, which a group of two ranks sits out."""
    keys = dict(**PACKED, data="33 pairs", num_epochs=1, edpo_log_pairs=1)
    single = runs.single(**keys)
    group = divided(runs, "fsdp2", 4, 2, **keys)
    assert_same_run(group[::3], single)
    alone, every = (
        pandas.read_parquet(Path(result[0]["out"]) / "edpo_pairs").set_index("id")
        for result in (single, group)
    )
    assert len(every) == 33 and every["global_step"].value_counts()[5] == 1
    own, other = (trace.sort_index() for trace in (every, alone))
    assert own["step"].equals(other["step"])
    assert own["plus"].to_numpy() == pytest.approx(other["plus"].to_numpy(), abs=1e-5)


@rest
@pytest.mark.parametrize(("name", "count"), [("ddp", 2), ("fsdp2", 4)])
def test_evaluation_counts_every_pair_once(runs, name, count):
    keys = dict(**PACKED, max_steps=2, eval_steps=1, eval_batch_size=2)
    keys |= dict(test_datasets=tiny.dataset(runs.parts["5 pairs"]))
    single, group = runs.single(**keys), divided(runs, name, count, 2, **keys)
    assert_same_run(group[:2], single)
    assert_same_evaluation(group, single)


@rest
def test_a_run_goes_on_with_another_degree(runs):
    """From a group of two to one process, to a group of four, and to FSDP2."""
    whole = runs.single(**PACKED)
    half = dict(**PACKED, max_steps=5, save_strategy="steps", save_steps=5)
    (start, *_) = divided(runs, "ddp", 2, 2, **half)
    keys = dict(**PACKED, resume_from_checkpoint=f"{start['out']}/checkpoint-5")
    (alone,) = runs.single(**keys)
    assert_same_run([alone, alone], whole)
    assert_same_run(divided(runs, "ddp", 4, 4, **keys)[:2], whole)
    (start, *_) = divided(runs, "fsdp2", 4, 2, **half)
    keys = dict(**PACKED, resume_from_checkpoint=f"{start['out']}/checkpoint-5")
    assert_same_run(divided(runs, "fsdp2", 2, 2, **keys), whole)


def test_ranks_that_make_no_groups_are_refused(runs):
    """Before a model is loaded."""
    keys = dict(**PACKED, context_parallel_size=2)
    with pytest.raises(ProcessRaisedException, match="4 GPUs: without `fsdp_config:`"):
        runs.many("ddp", 4, **keys)
    keys["context_parallel_size"] = 4  # of which axolotl would make 0 pairs a step
    with pytest.raises(ProcessRaisedException, match="with 2 GPUs: 4 does not divide"):
        runs.double("ddp", **keys)


def test_the_router_loss_of_experts_is_refused(runs):
    keys = dict(**PACKED, model="experts")
    with pytest.raises(ProcessRaisedException, match="set `router_aux_loss_coef: 0`"):
        divided(runs, "ddp", 2, 2, **keys)
