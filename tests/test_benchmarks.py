"""benchmarks: the ratios by hand, and micro-batches that are dealt evenly."""

import argparse
import importlib
import statistics
import sys
from dataclasses import replace

import pytest
from conftest import ROOT

from axolotl_edpo.collator import PairCollator

sys.path.insert(0, str(ROOT / "benchmarks"))
train_step = importlib.import_module("train_step")
balance = importlib.import_module("balance")

GIB = 2**30
RUN = train_step.Run(
    seconds=10.0, peak_bytes=4 * GIB, first_loss=0.6931, pairs=8, steps=1, tokens=900
)


def cells(rows):
    return [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]


def test_speed_and_memory_are_relative_to_dpo_in_the_same_turn():
    runs = {
        "dpo": [RUN, replace(RUN, seconds=20.0)],
        # 10 / 2.5 = 4 and 20 / 2.5 = 8; their median is 6
        "packed": [replace(RUN, seconds=2.5, peak_bytes=GIB)] * 2,
    }
    dpo, packed = cells(train_step.table_rows("hh", runs))
    assert dpo[:6] == ["hh", "8", "dpo", "1.0 ×", "1.00 ×", "4.00"]
    assert packed[:6] == ["hh", "8", "packed", "6.0 ×", "0.25 ×", "1.00"]
    assert packed[6].endswith("loss of step 1: 0.6931; 1 steps, 900 tokens")


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


def test_dpo_always_runs_and_first():
    assert train_step.contenders("shared,padded") == ["dpo", "padded", "shared"]
    with pytest.raises(argparse.ArgumentTypeError, match="zero: none of dpo, padded"):
        train_step.contenders("zero")


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
