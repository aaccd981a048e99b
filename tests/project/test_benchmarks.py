"""benchmarks: the ratios by hand, and micro-batches that are dealt evenly."""

import argparse
import importlib
import os
import statistics
import sys
from dataclasses import replace
from time import perf_counter

import pytest
import torch
from axolotl.integrations.base import PluginManager
from helpers import tiny
from helpers.paths import ROOT
from transformers import LlamaConfig

from axolotl_edpo.data.collator import PairCollator

sys.path.insert(0, str(ROOT / "benchmarks"))
train_step = importlib.import_module("train_step")
balance = importlib.import_module("balance")
parts = importlib.import_module("parts")

LACKS_LIGER = train_step.lacks_liger()
MIB, GIB = 2**20, 2**30
DEVICE = "cuda" if train_step.ON_GPU else "cpu"
RUN = train_step.Run(
    seconds=10.0,
    cache_seconds=0.0,
    step_seconds=2.0,
    cpu_seconds=3.0,
    waited=0.0,
    peak_bytes=4 * GIB,
    imports_bytes=GIB,
    logits_bytes=2**20,
    first_loss=0.6931,
    pairs=8,
    steps=4,
    tokens=900,
    scored=300,
    reference_bytes=0,
    trace_seconds=0.0,
)


def cells(rows):
    return [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]


def test_speed_and_memory_are_relative_to_the_baseline_in_the_same_turn():
    runs = {
        "dpo": [RUN, replace(RUN, seconds=20.0, step_seconds=4.0)],
        # 10 / 2.5 = 4 and 20 / 2.5 = 8; their median is 6. 0.5 / 2 and 0.5 / 4
        "packed": [replace(RUN, seconds=2.5, step_seconds=0.5, cpu_seconds=0.6)] * 2,
    }
    dpo, packed = cells(train_step.table_rows("hh", runs, {}))
    assert dpo[:6] == ["hh", "8", "dpo", "1.0 ×", "1.00 ×", "1.00 ×"]
    assert packed[:6] == ["hh", "8", "packed", "6.0 ×", "0.19 ×", "0.20 ×"]
    assert "loss of step 1: 0.6931; 4 steps, 900 tokens" in packed[8]
    shared = {"shared": runs["packed"], "dpo": runs["dpo"]}
    first, second = cells(train_step.table_rows("hh", shared, {}))
    assert first[2:5] == ["shared", "1.0 ×", "1.00 ×"]
    assert second[2:5] == ["dpo", "0.2 ×", "6.00 ×"]  # of 1/4, 1/8 and of 4, 8


def test_memory_is_told_whole_and_beyond_the_imports():
    # the larger of two turns: 2 of 4 GiB; 1.5 of 3, as half a GiB was there before
    small = replace(RUN, peak_bytes=2 * GIB, imports_bytes=GIB // 2)
    runs = {"dpo": [RUN] * 2, "packed": [small, replace(small, peak_bytes=GIB)]}
    dpo, packed = cells(train_step.table_rows("hh", runs, {}))
    assert dpo[6:8] == ["1.00 ×, 4.00 GiB", "1.00 ×, 3.00 GiB"]
    assert packed[6:8] == ["0.50 ×, 2.00 GiB", "0.50 ×, 1.50 GiB"]
    assert small.memory() == "2.00 GiB, 1.50 GiB beyond the imports"


def test_a_cache_is_told_with_its_cost_in_epochs_of_the_baseline():
    own = replace(RUN, cache_seconds=0.4, waited=0.0002, reference_bytes=5 * 2**20)
    fillings = {"cached": train_step.Filling(seconds=2.0, size=3 * 2**20)}
    runs = {"shared": [RUN], "cached": [own]}
    shared, cached = cells(train_step.table_rows("hh", runs, fillings))
    assert "cache" not in shared[-1]
    # an epoch is 4 steps of 2 s
    assert (
        "5.0 MiB; cache: 3.0 MiB, filled in 0.25 × and checked in 0.05 ×" in cached[-1]
    )
    assert cached[-1].endswith("waited 0.02% of the time for it")


@pytest.mark.parametrize(
    ("adapter", "checkpoints", "by_hand"),
    [
        # 300 × 2048 × 384 × 4, and 900 × 4 × (2 × 384² + 2 × 384 × 192 +
        # 3 × 384 × 1024) × 4
        (None, False, 943_718_400 / (943_718_400 + 23_357_030_400)),
        (None, True, 943_718_400 / (943_718_400 + 29_196_288_000)),
        # 3 and 3 of them
        ("lora", False, 707_788_800 / (707_788_800 + 17_517_772_800)),
    ],
)
def test_the_share_of_the_head_is_as_by_hand(adapter, checkpoints, by_hand):
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
    )
    args = argparse.Namespace(adapter=adapter, gradient_checkpointing=checkpoints)
    share = train_step.head_share(config, RUN.tokens, RUN.scored, args)
    assert share == pytest.approx(by_hand)


@pytest.mark.parametrize("other", [{"tokens": 899}, {"steps": 2}, {"pairs": 7}])
def test_contenders_that_train_something_else_are_an_error_that_names_them(other):
    train_step.check_same_work({"dpo": [RUN], "packed": [replace(RUN, seconds=1.0)]})
    with pytest.raises(RuntimeError, match="packed and dpo did not train the same"):
        train_step.check_same_work({"dpo": [RUN], "packed": [replace(RUN, **other)]})


def test_a_contender_that_prepares_its_own_data_is_an_error(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "a.lock").touch()
    train_step.check_preparation(tmp_path, "packed")
    (tmp_path / "two").mkdir()
    with pytest.raises(RuntimeError, match="packed prepared a dataset of its own"):
        train_step.check_preparation(tmp_path, "packed")


def test_the_baseline_always_runs_and_first():
    named = train_step.contenders("shared,padded")
    assert train_step.in_order(named, "dpo") == ["dpo", "padded", "shared"]
    assert train_step.in_order(named, "shared") == ["shared", "padded"]
    assert train_step.headings("shared")[2] == "contender, relative to shared"
    with pytest.raises(
        argparse.ArgumentTypeError, match="zero: none of dpo, dpo-chunked"
    ):
        train_step.contenders("zero")


@pytest.fixture
def probe():
    """axolotl keeps a plugin for all later runs of the process."""
    yield
    PluginManager.get_instance().plugins.pop(train_step.PROBE)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.skipif(LACKS_LIGER != "", reason=LACKS_LIGER)
@pytest.mark.usefixtures("probe")
def test_the_chunked_head_trains_as_the_plain_one_and_neither_passes_for_the_other(
    recipe, tmp_path, capfd
):
    runs, trained = {}, {}
    for name in train_step.RIVALS:
        keys = recipe(**{**tiny.DPO, **train_step.CONTENDERS[name]})
        trained[name] = losses(tiny.train(tmp_path, keys))
        runs[name] = train_step.reported(capfd.readouterr().out, resident=GIB)
        train_step.check_start(name, runs[name])
        train_step.check_head(name, runs[name])
    plain, chunked = runs.values()
    assert trained["dpo-chunked"] == pytest.approx(trained["dpo"], abs=1e-4)
    assert len(set(trained["dpo"])) == 5  # 40 pairs, 4 × 2 to a step; all moved
    vocab = len(tiny.byte_tokenizer())
    # eight sequences to a micro-batch, padded to the longest, float32 logits
    assert plain.logits_bytes % (8 * vocab * 4) == 0 < plain.logits_bytes
    assert chunked.logits_bytes == 0
    train_step.check_same_work({name: [run] for name, run in runs.items()})
    with pytest.raises(RuntimeError, match="dpo-chunked made logits of"):
        train_step.check_head("dpo-chunked", plain)
    with pytest.raises(RuntimeError, match="dpo made no logits"):
        train_step.check_head("dpo", chunked)


def test_a_run_that_does_not_begin_at_log_2_is_an_error_that_names_it():
    train_step.check_start("packed", RUN)
    with pytest.raises(RuntimeError, match="packed begins with a loss of 0.7100"):
        train_step.check_start("packed", replace(RUN, first_loss=0.71))


def test_a_chunked_head_that_cannot_run_is_refused_and_what_it_needs_is_named():
    assert train_step.lacks_liger("0.3") == ""
    assert train_step.lacks_liger("99") == (
        "dpo-chunked: TRL asks for liger-kernel 99 or newer"
    )


def test_where_liger_is_missing_it_is_refused_before_anything_runs(monkeypatch, capsys):
    """With axolotl 0.20, whose liger-kernel is older than its TRL asks for."""
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--baseline", "dpo-chunked"])
    if not LACKS_LIGER:
        assert train_step.parse_args().baseline == "dpo-chunked"
        return
    with pytest.raises(SystemExit):
        train_step.parse_args()
    assert LACKS_LIGER in capsys.readouterr().err


def test_all_is_relative_to_the_chunked_head_where_it_can_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_step.py"])
    args = train_step.parse_args()
    rivals = ["dpo"] if train_step.lacks_liger() else ["dpo-chunked", "dpo"]
    assert args.baseline == rivals[0]
    assert args.contenders == [*rivals, "padded", "packed", "shared", "cached"]
    assert "relative to" not in train_step.section(args)


@pytest.mark.usefixtures("probe")
def test_a_run_reports_what_its_cache_took(recipe, tmp_path, capfd):
    keys = recipe(**train_step.CONTENDERS["cached"], max_steps=4)
    folder = tmp_path / "cache"
    runs = {}
    for name in ("shared", "filling", "cached"):
        own = {} if name == "shared" else {"edpo_reference_cache": str(folder)}
        own |= {"precompute_ref_log_probs": name != "shared"}
        began = perf_counter()
        trainer = tiny.train(tmp_path, {**keys, **own})
        spent = perf_counter() - began
        runs[name] = run = train_step.reported(capfd.readouterr().out, resident=GIB)
        assert 0 < 3 * run.step_seconds + run.cache_seconds < run.seconds < spent
        assert 0 < run.cpu_seconds < run.seconds
    train_step.check_same_work({name: [run] for name, run in runs.items()})
    shared, filling, cached = runs.values()
    assert shared.cache_seconds == shared.waited == 0
    assert cached.cache_seconds > 0 and filling.cache_seconds > 0
    waited = cached.waited * 3 * cached.step_seconds
    assert 0 < waited <= trainer.reference.waited * (1 + 1e-9)
    head = trainer.model.lm_head.weight.nbytes
    assert cached.reference_bytes == head
    whole = sum(weight.nbytes for weight in trainer.model.parameters())
    assert shared.reference_bytes == whole > 2 * head
    # hidden states of 32 float32 values, and little beside them
    assert 0 < train_step.size_of(folder) / (cached.scored * 32 * 4) < 1.2
    assert 0 < cached.scored < cached.tokens


@pytest.mark.usefixtures("probe")
def test_a_run_reports_what_its_trace_took(recipe, tmp_path, capfd):
    keys = recipe(**train_step.CONTENDERS["traced"], max_steps=4)
    trainer = tiny.train(tmp_path, keys)
    run = train_step.reported(capfd.readouterr().out, resident=GIB)
    assert 0 < run.trace_seconds == trainer.records.trace.seconds < run.seconds
    # 0.02 s of 4 steps of 2 s
    told = replace(RUN, trace_seconds=0.02).evidence()
    assert told.endswith("; the trace took 0.25% of the time")
    assert "trace" not in RUN.evidence()


def test_the_parts_of_a_step_are_all_of_it(recipe, tmp_path, capfd):
    trainer = tiny.build(tmp_path, recipe(max_steps=4))
    trainer.add_callback(parts.Recorder())
    trainer.train()
    found = parts.reported(capfd.readouterr().out)
    whole = found.pop("all")
    assert set(found) == set(parts.PARTS)
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(whole)
    assert parts.rows("tiny", {"a": {"all": whole, **found}})[0].startswith(
        "| tiny | a | 1.00 × | "
    )


def test_a_step_takes_what_lies_between_the_ends_of_steps():
    clock = train_step.Clock(object())
    clock.ends, clock.cpu, clock.waited = [1.0, 3.0, 5.0], [7.0, 8.0, 10.0], [0, 1, 2]
    found = {"step_seconds": 2.0, "cpu_seconds": 1.5, "waited": 0.5}
    assert clock.found() == {"cache_seconds": 0.0, **found}


def test_what_was_there_before_the_policy_counts_as_imports_not_what_came_after():
    probe = train_step.Probe()
    probe.register({})
    probe.pre_model_load({})
    before = probe.imports_bytes
    policy = torch.ones(64 * MIB, dtype=torch.uint8, device=DEVICE)
    assert before + policy.nbytes / 2 < train_step.bytes_in_use()
    probe.pre_model_load({})  # axolotl loads the reference next
    assert probe.imports_bytes == before


def test_the_time_of_one_step_is_no_step_time():
    clock = train_step.Clock(object())
    clock.ends.append(1.0)
    with pytest.raises(ValueError, match="more --pairs"):
        clock.found()


def test_tokens_of_micro_batches_are_those_of_their_rows():
    def pair(answers):
        answer = [[7] * answers, [8] * answers]
        ids = dict(zip(("chosen_ids", "rejected_ids"), answer, strict=True))
        return {"prompt_ids": [5, 6], **ids}

    collator = PairCollator(pad_token_id=0)
    step = [[pair(3), pair(3)], [pair(1), pair(1)]]
    found = [balance.tokens(step, collator, order) for order in balance.ORDERS.values()]
    # two sequences of 2 + 3 or of 2 + 1 tokens each; a shared prompt saves 2
    assert found == [[20, 12], [16, 16], [12, 12]]


def test_dealt_micro_batches_are_even_and_drawn_ones_are_not(tmp_path):
    options = ["--pairs", "160", "--vocab", "600", "--accumulation", "8"]
    args = train_step.data_parser("balance").parse_args(options)
    ((_, pairs),) = train_step.sources(args)
    keys = balance.model_keys(tmp_path, pairs, args)
    trainer = balance.build_trainer(tmp_path / "data", keys, pairs, args)
    ratios = {
        name: balance.imbalances(trainer, order, args)
        for name, order in balance.ORDERS.items()
    }
    assert {len(found) for found in ratios.values()} == {5}  # 160 / (4 x 8)
    drawn, dealt, shared = map(statistics.median, ratios.values())
    assert drawn > 1.4
    assert 1 <= dealt <= 1.15
    assert 1 <= shared <= 1.15


def test_another_checkout_takes_turns_with_its_package_and_its_probe(tmp_path):
    names = train_step.with_before(["dpo", "shared", "cached"])
    assert names == ["dpo", "shared", "shared before", "cached", "cached before"]
    assert train_step.keys_of("cached before") == train_step.CONTENDERS["cached"]
    assert train_step.caches("cached before") and not train_step.caches("shared before")
    env = train_step.child_environment(tmp_path / "cache", 1, tmp_path)
    first = env["PYTHONPATH"].split(os.pathsep)[:2]
    assert first == [str(tmp_path / "benchmarks"), str(tmp_path)]
