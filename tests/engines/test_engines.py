"""Two ranks under every engine give the run that one process gives."""

import inspect
import json
import os
import traceback
from pathlib import Path

import pandas
import pytest
import torch
from helpers import ranks, tiny
from helpers.engine_runs import (
    PACKED,
    Runs,
    assert_same_beta,
    assert_same_evaluation,
    assert_same_run,
    assert_same_weights,
)
from helpers.engines import ENGINES, engine, series
from helpers.lora_kernels import KERNELS
from helpers.releases import needs_late_kernels
from helpers.tiers import first, only, rest
from helpers.tiny import CACHED, LORA, NF4
from torch.multiprocessing import ProcessRaisedException
from transformers import LlamaForCausalLM, LlamaModel

import axolotl_edpo
from axolotl_edpo.distributed import gathered, write
from axolotl_edpo.losses.edpo import next_beta
from axolotl_edpo.losses.reference_free import REFERENCE_FREE
from axolotl_edpo.run_files import WARNINGS, checkpoints, is_complete
from axolotl_edpo.training.callbacks import EDPOCallback

CPU = {"device": "cpu"}
SHARDING = ["ddp", "zero3", "fsdp2"]

FILTERED = dict(edpo_control="batch_margin", edpo_epsilon=None, edpo_margin_keep=0.8)
HEAD_LORA = dict(adapter="lora", lora_r=4, lora_alpha=8)
HEAD_LORA |= dict(lora_target_modules=["q_proj", "lm_head"])


@pytest.fixture(scope="session")
def parts(parts):
    """Those of the other tests, more models, and data of odd sizes."""
    folder = parts["model"].parent
    more = {
        f"{count} pairs": tiny.save_pairs(folder / f"{count}.jsonl", count)
        for count in (5, 33, 37)
    }
    more["tied"] = tiny.save_model(folder / "tied", tie_word_embeddings=True)
    more["windows"] = tiny.save_model(folder / "windows", "mistral", sliding_window=16)
    more["experts"] = tiny.save_model(folder / "experts", "mixtral", **tiny.EXPERTS)
    more["wide"] = tiny.save_model(folder / "wide", hidden_size=64)
    return {**parts, **more}


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    return Runs(parts, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
@pytest.mark.parametrize("name", only(ENGINES, lambda name: "-" not in name))
def test_two_ranks_train_as_one_process(runs, name, adapter):
    """Packed, prompts shared, pairs dealt."""
    single = runs.single(**PACKED, **adapter)
    pair = runs.double(name, **PACKED, **adapter)
    assert len(series(single[0], "loss")) == 10 and single[0]["beta"] != 0.1
    assert_same_run(pair, single)
    assert_same_weights(pair, single, atol=1e-6)
    assert not Path(os.environ["TORCH_EXTENSIONS_DIR"]).exists()  # nothing was compiled


def kept(train):
    """The probe: what of a reference of its own is left on this rank."""
    trainer = train()
    head = trainer.reference.kept_head
    return trainer, {"model": trainer.ref_model is not None, "head": head is not None}


@pytest.mark.parametrize(
    ("name", "adapter"),
    only(
        [
            *((name, {}) for name in ENGINES),
            *((name, adapter) for name in SHARDING for adapter in (LORA, HEAD_LORA)),
        ],
        lambda name, adapter: name in ("zero3", "fsdp2") and not adapter,
    ),
)
def test_a_cache_changes_nothing(runs, name, adapter, tmp_path):
    """Each rank computes a part of it; what every rank reads was another's, too."""
    single = runs.single(**PACKED, **adapter)
    cache = dict(CACHED, edpo_reference_cache=str(tmp_path / "cache"))
    pair = runs.double(name, probe="test_engines:kept", **PACKED, **adapter, **cache)
    assert_same_run(pair, single)
    assert_same_weights(pair, single, atol=1e-6)
    assert [(run["model"], run["head"]) for run in pair] == [(False, not adapter)] * 2


@rest
@pytest.mark.parametrize("adapter", [{}, HEAD_LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", SHARDING)
def test_two_numbers_are_enough_for_a_fixed_beta(runs, name, adapter, tmp_path):
    """Each rank computes a part of them; of the reference's model nothing stays."""
    keys = dict(edpo_control="fixed", edpo_epsilon=None, **PACKED, **adapter)
    cache = dict(CACHED, edpo_reference_cache=str(tmp_path / "cache"))
    (alone,) = single = runs.single(**keys)
    pair = runs.double(name, probe="test_engines:kept", **keys, **cache)
    assert_same_weights(pair, single, atol=1e-6)
    for metric in ("loss", "rewards/margins", "grad_norm"):
        for run in pair:
            expected = pytest.approx(series(alone, metric), rel=1e-3, abs=1e-6)
            assert series(run, metric) == expected, metric
    assert [(run["model"], run["head"]) for run in pair] == [(False, False)] * 2
    files = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) < 1024 + 56 * 40


def alone(train):
    """The probe: what is loaded and what runs on this rank, in a run of ten steps."""
    loads, forwards = [], []
    load, forward = LlamaForCausalLM.from_pretrained, LlamaModel.forward

    def counted(calls, call):
        return lambda *args, **keys: (calls.append(1), call(*args, **keys))[1]

    LlamaForCausalLM.from_pretrained = counted(loads, load)
    LlamaModel.forward = counted(forwards, forward)
    trainer = train()
    seen = dict(loads=len(loads), forwards=len(forwards))
    return trainer, seen | {"model": trainer.ref_model is not None}


@pytest.mark.parametrize(
    ("name", "loss", "adapter"),
    only(
        [
            ("ddp", "orpo", {}),
            *(("zero3", loss, {}) for loss in REFERENCE_FREE),
            *((name, "simpo", LORA) for name in SHARDING),
            *(("ddp", loss, {}) for loss in REFERENCE_FREE if loss != "orpo"),
            ("fsdp2", "simpo", {}),
        ],
        lambda name, loss, adapter: (name, loss) == ("ddp", "orpo"),
    ),
)
def test_without_a_reference_two_ranks_train_as_one(runs, name, loss, adapter):
    """One model is loaded; it runs for micro-batches and at the start, and no more."""
    keys = dict(edpo_control="fixed", edpo_epsilon=None, **PACKED, **adapter)
    keys |= dict(dpo_loss_type=[loss], probe="test_engines:alone")
    if not REFERENCE_FREE[loss].has_beta:
        keys["beta"] = None
    (alone,) = single = runs.single(**keys)
    pair = runs.double(name, **keys)
    assert_same_weights(pair, single, atol=1e-6)
    for metric in ("loss", "rewards/margins", "grad_norm"):
        for run in pair:
            expected = pytest.approx(series(alone, metric), rel=1e-3, abs=1e-6)
            assert series(run, metric) == expected, metric
    for run, batches in ((alone, 40), *((run, 20) for run in pair)):
        assert run["loads"] == 1 and not run["model"]
        assert run["forwards"] - batches == alone["forwards"] - 40


@pytest.mark.parametrize("adapter", first([{}, HEAD_LORA]), ids=["full", "lora"])
def test_bf16_rounds_no_statistic_of_the_head(runs, adapter):
    """In mixed precision FSDP2 casts what a forward returns, and copies arguments."""
    keys = dict(model="windows", bf16=True, max_steps=2, **PACKED, **adapter)
    single = runs.single(**keys)
    shards = {**ranks.FSDP2, "transformer_layer_cls_to_wrap": "MistralDecoderLayer"}
    pair = runs.double("fsdp2", **keys, fsdp_config=shards)
    assert_same_beta(pair)
    for metric in ("logps/chosen", "logps/rejected", "entropy", "logits/chosen"):
        own, alone = (series(run[0], metric)[0] for run in (pair, single))
        assert own == pytest.approx(alone, rel=5e-4), metric


HEADS = {
    "tied": dict(model="tied"),
    "saved": dict(**LORA, lora_modules_to_save=["lm_head", "embed_tokens"]),
    "adapter": dict(
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=["q_proj", "lm_head"],
    ),
    "unreadable": dict(
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=["q_proj", "lm_head"],
        peft_use_dora=True,
    ),
    "added tokens": dict(special_tokens={"pad_token": "<new>"}),
    "sft": dict(dpo_loss_type=["sigmoid", "sft"]),
    "length penalty": dict(edpo_length_penalty=0.03),
    "checkpointing": dict(gradient_checkpointing=True),
    "checkpointing-lora": dict(**LORA, gradient_checkpointing=True),
}
# Those that `make test` gathers, under ZeRO-3.
SOON = ("tied", "saved", "unreadable")


@pytest.mark.parametrize(
    ("name", "option"),
    # test_recipe.py: FSDP2 refuses modules that are saved beside an adapter
    only(
        [(n, o) for n in SHARDING for o in HEADS if (n, o) != ("fsdp2", "saved")],
        lambda name, option: name == "zero3" and option in SOON,
    ),
)
def test_every_head_is_gathered_and_trained(runs, name, option):
    """An unreadable one makes its own logits."""
    keys = dict(**PACKED, **HEADS[option], max_steps=4)
    single, pair = runs.single(**keys), runs.double(name, **keys)
    assert_same_run(pair, single)
    assert_same_weights(pair, single, atol=1e-6)


@pytest.mark.parametrize("name", first(["fsdp2", "ddp", "zero3"]))
def test_a_mixture_of_experts_keeps_its_router_loss(runs, name):
    """That of each micro-batch, which is why pairs are not dealt here."""
    keys = dict(model="experts", dpo_padding_free=True, max_steps=4)
    single, shards = runs.single(**keys), {}
    if name == "fsdp2":
        wrapped = {"transformer_layer_cls_to_wrap": "MixtralDecoderLayer"}
        shards = {"fsdp_config": {**ranks.FSDP2, **wrapped}}
    pair = runs.double(name, **keys, **shards)
    assert_same_run(pair, single)
    alone = series(single[0], "aux_loss")
    assert series(pair[0], "aux_loss") == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", first(["ddp", "zero3", "zero2", "fsdp2"]))
def test_a_reference_that_moves_goes_on_from_a_checkpoint(runs, name):
    keys = dict(trl={"sync_ref_model": True, "ref_model_sync_steps": 3})
    whole = runs.single(**PACKED, **keys)
    assert_same_run(runs.double(name, **PACKED, **keys), whole)
    start = dict(resume_from_checkpoint=half(runs, 2, name, **keys))
    assert_same_run(runs.double(name, **PACKED, **keys, **start), whole)


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
@pytest.mark.parametrize("name", first(SHARDING))
def test_batch_margin_takes_the_pairs_of_all_ranks_for_its_batch(runs, name, adapter):
    """β and the pairs that the filter leaves out; then on from a checkpoint."""
    keys = dict(**PACKED, **FILTERED, **adapter)
    whole, pair = runs.single(**keys), runs.double(name, **keys)
    assert_same_run(pair, whole)
    betas = series(pair[0], "kl/beta")
    assert max(betas) > 0.105 and min(betas) < 0.1
    if not adapter:
        start = half(runs, 2, name, **FILTERED)
        assert_same_run(runs.double(name, **keys, resume_from_checkpoint=start), whole)


def test_the_filter_weighs_alike_where_deepspeed_rounds_batches_to_bf16(runs):
    """In the first step all margins are 0, so its loss is ln 2, however it is cut."""
    keys = dict(**FILTERED, bf16=True, max_steps=1)
    for rows in (dict(micro_batch_size=4, gradient_accumulation_steps=1), {}):
        first, second = runs.double("zero2", **keys, **rows)
        assert series(first, "loss") == pytest.approx([0.693147], abs=1e-5)
        assert series(second, "loss") == series(first, "loss")


@pytest.mark.parametrize("name", first(SHARDING))
def test_every_rank_traces_its_own_pairs(runs, name):
    """33 pairs: the last step is one pair, on one rank."""
    keys = dict(**PACKED, data="33 pairs", num_epochs=1, edpo_log_pairs=1)
    traces = [
        pandas.read_parquet(Path(result[0]["out"]) / "edpo_pairs").set_index("id")
        for result in (runs.single(**keys), runs.double(name, **keys))
    ]
    alone, both = (trace.sort_index() for trace in traces)
    assert len(both) == 33 and both["global_step"].value_counts()[5] == 1
    assert both["step"].equals(alone["step"])
    for column in ("global_step", "chosen_tokens", "prompt", "rejected"):
        assert both[column].equals(alone[column]), column
    for column in ("plus", "minus", "beta", "margin", "kl"):
        own = both[column].to_numpy()
        assert own == pytest.approx(alone[column].to_numpy(), abs=1e-5), column


@pytest.mark.parametrize("cache", first([{}, CACHED]), ids=["live", "cached"])
@pytest.mark.parametrize("name", first(["zero3", "ddp", "zero2"]))
def test_qlora_trains_as_one_process(runs, name, cache):
    """As far as bf16 tells: DeepSpeed keeps the adapter in it."""
    keys = dict(model="wide", **NF4, max_steps=4, **cache)
    single, pair = runs.single(**keys), runs.double(name, **keys)
    assert_same_beta(pair)
    for metric, close in (("loss", 5e-3), ("kl/beta", 3e-3), ("kl/policy_ref", 5e-3)):
        alone = series(single[0], metric)
        assert series(pair[0], metric) == pytest.approx(alone, abs=close), metric


@pytest.mark.parametrize(("pairs", "mode"), [(33, PACKED), (37, {})])
@pytest.mark.parametrize("name", first(SHARDING))
def test_every_pair_counts_once_where_the_last_ones_are_too_few(
    runs, name, pairs, mode
):
    """33 pairs leave one for the last step, which a rank has to sit out."""
    keys = dict(**mode, data=f"{pairs} pairs", num_epochs=1)
    single, pair = runs.single(**keys), runs.double(name, **keys)
    assert_same_run(pair, single)
    up, down = (
        series(pair[0], name)[-1] * (pairs - 32)
        for name in ("kl/p_epsilon_steps", "kl/n_epsilon_steps")
    )
    last = series(pair[0], "kl/beta")[-1]
    counts = [round(down), pairs - 32 - round(up) - round(down), round(up)]
    assert counts == pytest.approx([down, pairs - 32 - up - down, up], abs=1e-5)
    assert pair[0]["beta"] == next_beta(last, 0.05, counts, "arithmetic")


@pytest.mark.parametrize("name", first(SHARDING))
def test_evaluation_counts_every_pair_once(runs, name):
    """Five pairs in batches of two: accelerate fills up with three."""
    keys = dict(max_steps=2, eval_steps=1, eval_batch_size=2)
    keys |= dict(dpo_padding_free=True, edpo_prefix_sharing=False)
    keys |= dict(dpo_loss_type=["sigmoid", "sft"])  # a mean over the set's tokens
    keys |= dict(test_datasets=tiny.dataset(runs.parts["5 pairs"]))
    single, pair = runs.single(**keys), runs.double(name, **keys)
    assert_same_run(pair, single)
    assert_same_evaluation(pair, single)


@rest
@pytest.mark.parametrize("name", SHARDING)
def test_ranks_stop_together_beyond_the_bound_of_kl(runs, name):
    keys = dict(learning_rate=0.1, edpo_max_kl=0.5, max_steps=10)
    keys |= dict(save_strategy="steps", save_steps=100)
    single, pair = runs.single(**keys), runs.double(name, **keys)
    for result in (*single, *pair):
        *before, last = [log for log in result["log"] if "kl/policy_ref" in log]
        assert all(log["kl/policy_ref"] <= 0.5 for log in before)
        assert last["kl/policy_ref"] > 0.5 and [*last[WARNINGS]] == ["edpo_max_kl"]
        assert last["step"] == len(before) + 1 < 10
        (checkpoint,) = checkpoints(Path(result["out"]))
        assert checkpoint.name == f"checkpoint-{last['step']}"
        assert is_complete(checkpoint)
    assert pair[0]["log"][-2][WARNINGS] == pair[1]["log"][-2][WARNINGS]


def half(runs, count: int, name: str = "ddp", **keys) -> str:
    """The checkpoint of a run that ended after 5 of 10 steps."""
    keys |= dict(max_steps=5, save_strategy="steps", save_steps=5, **PACKED)
    results = runs.single(**keys) if count == 1 else runs.many(name, count, **keys)
    return str(Path(results[0]["out"]) / "checkpoint-5")


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
def test_a_run_goes_on_with_more_ranks_and_with_fewer(runs, adapter):
    whole = runs.single(**PACKED, **adapter)
    fewer = dict(resume_from_checkpoint=half(runs, 2, **adapter))
    (alone,) = runs.single(**PACKED, **adapter, **fewer)
    assert_same_run([alone, alone], whole)
    more = dict(resume_from_checkpoint=half(runs, 1, **adapter))
    assert_same_run(runs.double("ddp", **PACKED, **adapter, **more), whole)


@rest
def test_fsdp2_goes_on_with_more_ranks_and_with_fewer(runs):
    whole = runs.single(**PACKED)
    start = dict(resume_from_checkpoint=half(runs, 2, "fsdp2"))
    assert_same_run(runs.many("fsdp2", 4, **PACKED, **start)[:2], whole)
    start = dict(resume_from_checkpoint=half(runs, 4, "fsdp2"))
    assert_same_run(runs.double("fsdp2", **PACKED, **start), whole)


def test_zero3_goes_on_in_a_process_without_it(runs):
    """With its weights and β, and a new optimizer: of that, a line is logged."""
    whole = runs.single(**PACKED)
    start = half(runs, 2, "zero3")
    (alone,) = runs.single(**PACKED, resume_from_checkpoint=start)
    betas = series(alone, "kl/beta")
    assert betas[:6] == pytest.approx(series(whole[0], "kl/beta")[:6], abs=1e-6)
    assert series(alone, "loss")[5] == pytest.approx(
        series(whole[0], "loss")[5], abs=1e-5
    )
    (log,) = Path(alone["out"]).glob("debug.log")
    assert "was saved by another engine" in log.read_text()
    same = runs.double("zero3", **PACKED, resume_from_checkpoint=start)
    assert_same_run(same, whole)
    with pytest.raises(ProcessRaisedException, match="among 2 ranks, and there are 4"):
        runs.many("zero3", 4, **PACKED, resume_from_checkpoint=start)


COLLECTIVES = ("all_", "broadcast", "barrier", "gather", "scatter", "reduce", "monitor")
SUMS = ("sum_over_ranks", "count_over_ranks")
OURS, OTHERS = Path(axolotl_edpo.__file__).parent, {"transformers", "trl", "axolotl"}


def asker() -> str | None:
    """Which function of ours calls this, if no other package is in between."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(OURS) and frame.name not in SUMS:
            return frame.name
        *_, packages = frame.filename.partition("site-packages/")
        if packages.split("/")[0] in OTHERS:
            return None
    return None


def our_collectives(train) -> tuple:
    """The probe: which of our functions asks all ranks, in which optimizer step."""
    asked, states = [], []

    def counted(function):
        def call(*args, **kwargs):
            if states and (name := asker()):
                asked.append((states[0].global_step, name))
            return function(*args, **kwargs)

        return call

    for name in torch.distributed.distributed_c10d.__all__:
        function = getattr(torch.distributed, name)
        if inspect.isfunction(function) and name.startswith(COLLECTIVES):
            setattr(torch.distributed, name, counted(function))
    begin = EDPOCallback.on_train_begin

    def noted(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        states.append(state)

    EDPOCallback.on_train_begin = noted
    return train(), {"asked": asked}


CONTROLS = {"epsilon": {}, "fixed": dict(edpo_control="fixed", edpo_epsilon=None)}


@pytest.mark.parametrize("control", CONTROLS)
def test_ranks_sum_up_twice_per_optimizer_step_and_once_per_log(runs, control):
    """What a step holds before it, steps and losses before its last backward.

    And the means where they are logged, here after every second step.
    """
    keys = dict(logging_steps=2, probe="test_engines:our_collectives", **PACKED)
    for result in runs.double("ddp", **keys, **CONTROLS[control]):
        by_step = [[who for at, who in result["asked"] if at == n] for n in range(10)]
        step = ["count", "_sum"]
        assert by_step[3::2] == [step] * 4  # the first step is logged as well
        assert by_step[2::2] == [["pop", *step]] * 4


def zero3_of_small_weights(folder: Path) -> dict:
    """Keys of ZeRO-3, which would keep small weights whole, without that threshold."""
    keys = engine(folder, "zero3")
    path = Path(keys["deepspeed"])
    config = json.loads(path.read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(config))
    return keys


def written(train):
    """The probe: overwrites a weight at the end of a step, and gathers it again."""
    moved, end = [], EDPOCallback.on_step_end

    def then_write(self, args, state, control, model, **kwargs):
        end(self, args, state, control, model=model, **kwargs)
        weight = model.model.layers[0].mlp.up_proj.weight
        with gathered([weight]) as (whole,):
            before = whole.detach().clone()
        write(weight, before + 1)
        with gathered([weight]) as (whole,):
            moved.append((whole - before).mean().item())

    EDPOCallback.on_step_end = then_write
    return train(), {"moved": moved}


@pytest.mark.parametrize("name", first(["zero3", "fsdp2"]))
def test_a_weight_that_is_overwritten_stays_so(runs, name, tmp_path):
    """As the reference of TR-DPO is, from a checkpoint."""
    sharded = zero3_of_small_weights(tmp_path) if name == "zero3" else {}
    pair = runs.double(name, probe="test_engines:written", max_steps=1, **sharded)
    assert [*pair[0]["moved"], *pair[1]["moved"]] == pytest.approx([1.0, 1.0])


@rest
@needs_late_kernels
@pytest.mark.parametrize("name", SHARDING)
def test_lora_kernels_find_the_weights_that_an_engine_shards(runs, name, tmp_path):
    """They read weights without calling the layers, of which engines gather them."""
    keys = dict(**PACKED, **LORA, max_steps=3)
    single = runs.single(**keys)
    sharded = zero3_of_small_weights(tmp_path) if name == "zero3" else {}
    probe = "helpers.lora_kernels:probe"
    pair = runs.double(name, probe=probe, **keys, **KERNELS, **sharded)
    assert_same_run(pair, single)
    assert_same_weights(pair, single, atol=1e-6)
    assert [run["kernels"] for run in pair] == [sorted(KERNELS)] * 2
    assert series(pair[0], "kl/p_epsilon_steps")[0] == 0.0
    assert series(pair[0], "kl/n_epsilon_steps")[0] == 0.0
