"""Runs whose next step is collated in the background train as if it were not."""

import threading
import traceback

import pytest
import torch
from helpers import tiny

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.trainer import EDPOTrainer
from axolotl_edpo.training.batching import PairBatcher

PACKED = {"sample_packing": True}
UNEVEN = dict(micro_batch_size=3, gradient_accumulation_steps=4)  # 12, 12, 12, 3 + 1
WAYS = {
    "packed": {**PACKED, **UNEVEN, "num_epochs": 2},
    "padded": {**UNEVEN, "num_epochs": 2},
    "padding-free": {**UNEVEN, "dpo_padding_free": True},
    "workers": {**PACKED, "num_epochs": 2, "dataloader_num_workers": 2},
    "whole steps": {**PACKED, "num_epochs": 3, "max_steps": 12},
    "one micro-batch": {"gradient_accumulation_steps": 1, "max_steps": 12},
}


@pytest.fixture
def laying(monkeypatch):
    """Pairs of each micro-batch laid in training, and the thread that laid it."""
    lay, laid = PairBatcher.lay_out, []

    def noted(self, step):
        batches = lay(self, step)
        pairs = [batch["examples"].pairs for batch in batches]
        laid.append((threading.current_thread().name, pairs))
        return batches

    monkeypatch.setattr(PairBatcher, "lay_out", noted)
    return laid


def history(trainer) -> list[dict]:
    timing = ("runtime", "second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timing)}
        for entry in trainer.state.log_history
    ]


def trained(trainer) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trainer.model.parameters()]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def assert_same_with_and_without(recipe, tmp_path, monkeypatch, laying, keys) -> list:
    """To the last bit; returns which thread laid each step."""
    ahead = tiny.train(tmp_path / "ahead", recipe(**keys))
    names = [name for name, _ in laying]
    pairs = [pairs for _, pairs in laying]
    assert ahead.batcher.next_step is None and "next-step" not in threads()
    assert len(names) == ahead.state.global_step
    laying.clear()
    monkeypatch.setattr(PairBatcher, "_read_next", lambda *args: None)
    plain = tiny.train(tmp_path / "plain", recipe(**keys))
    assert {name for name, _ in laying} == {"MainThread"}
    assert pairs == [pairs for _, pairs in laying]
    assert history(ahead) == history(plain)
    for a, b in zip(trained(ahead), trained(plain), strict=True):
        assert torch.equal(a, b)
    assert ahead.controller.beta == plain.controller.beta != 0.1
    return names


@pytest.fixture
def folders(tmp_path):
    for name in ("ahead", "plain"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_same_and_all_but_the_first_step_of_an_epoch_are_laid_before(
    recipe, folders, monkeypatch, laying, way
):
    keys = WAYS[way]
    names = assert_same_with_and_without(recipe, folders, monkeypatch, laying, keys)
    size = keys.get("micro_batch_size", 4) * keys.get("gradient_accumulation_steps", 2)
    steps = -(-40 // size)
    epoch = ["MainThread", *["next-step"] * (steps - 1)]
    assert names == (epoch * 3)[: len(names)] and len(names) >= keys.get("max_steps", 4)


def test_evaluations_between_steps_change_nothing(
    recipe, parts, folders, monkeypatch, laying
):
    keys = dict(eval_steps=1, test_datasets=tiny.dataset(parts["eval"]), **PACKED)
    names = assert_same_with_and_without(recipe, folders, monkeypatch, laying, keys)
    assert names == ["MainThread", *["next-step"] * 4]


def test_a_cache_is_read_as_before(recipe, folders, monkeypatch, laying):
    keys = {**tiny.CACHED, **PACKED, "num_epochs": 2}
    assert_same_with_and_without(recipe, folders, monkeypatch, laying, keys)


def test_a_resume_in_the_middle_of_an_epoch_lays_the_same_pairs(
    recipe, tmp_path, laying
):
    keys = dict(num_epochs=2, save_steps=3, save_strategy="steps", **PACKED)
    tiny.train(tmp_path, recipe(**keys))
    whole = [pairs for _, pairs in laying]
    laying.clear()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    tiny.train(tmp_path, recipe(**keys, resume_from_checkpoint=checkpoint))
    assert [pairs for _, pairs in laying] == whole[3:]
    assert [name for name, _ in laying] == [
        *["MainThread", "next-step"] * 2,
        *["next-step"] * 3,
    ]


def test_nothing_is_read_after_the_last_step(recipe, tmp_path, laying):
    tiny.train(tmp_path, recipe(**PACKED, max_steps=2))
    assert len(laying) == 2


def test_an_error_in_the_background_ends_the_run_with_its_traceback(
    recipe, tmp_path, monkeypatch
):
    balance, steps = PairCollator.balance, []

    def broken(self, step):
        steps.append(step)
        return balance(self, step if len(steps) < 3 else [[{"prompt_ids": [1]}]])

    monkeypatch.setattr(PairCollator, "balance", broken)
    trainer = tiny.build(tmp_path, recipe(**PACKED))
    with pytest.raises(KeyError, match="chosen_ids") as error:
        trainer.train()
    assert trainer.state.global_step == 2
    frames = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert {"get_batch_samples", "lay_out", "broken", "_pairs"} <= set(frames)
    assert trainer.batcher.next_step is None and "next-step" not in threads()


def test_an_error_of_the_step_lets_go_of_the_next_one(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(EDPOTrainer, "training_step", lambda *args: 1 / 0)
    trainer = tiny.build(tmp_path, recipe(**PACKED))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.batcher.next_step is None


def test_a_step_that_is_asked_for_otherwise_is_laid_anew(recipe, tmp_path):
    """More micro-batches than were read ahead, and those of another iterator."""
    trainer = tiny.build(tmp_path, recipe(**PACKED, micro_batch_size=2))
    trainer.state.max_steps = 100
    trainer.prepare(trainer.model)
    loader, cpu = trainer.get_train_dataloader(), torch.device("cpu")

    def read(source, count):
        batches, _ = trainer.get_batch_samples(source, count, cpu)
        return [pair for batch in batches for pair in batch["examples"].pairs]

    every = {str(pair) for pair in trainer.train_dataset}
    for counts, found in (((3, 5, 12), [6, 10, 24]), ((19, 19, 19), [38, 2, 0])):
        source = iter(loader)
        steps = [read(source, count) for count in counts]
        assert [*map(len, steps)] == found
        assert {str(pair) for step in steps for pair in step} == every
    read(iter(loader), 3)
    assert len(read(iter(loader), 20)) == 40
