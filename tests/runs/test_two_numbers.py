"""`precompute_ref_log_probs` beside a fixed β or β-DPO: two numbers per pair are kept.

The run is the one in which the reference runs for every batch; no KL is logged.
"""

import json
import math
from pathlib import Path

import pandas
import pytest
import torch
from helpers import tiny
from helpers.controls import FILTERED, FIXED, HALF_TAILS, MARGIN
from helpers.tiers import first, rest
from helpers.tiny import CACHED, DPO, LORA, NF4
from helpers.weights import assert_same_weights
from safetensors.torch import load_file

from axolotl_edpo.data.pair_id import pair_digest
from axolotl_edpo.reference import provider
from axolotl_edpo.report import page

KL = "kl/policy_ref"
PACKED = {"sample_packing": True}
DORA = LORA | {"lora_target_modules": ["q_proj", "lm_head"], "peft_use_dora": True}
OPTIONS = {
    "padded": {},
    "shared": PACKED,
    "margins": {**MARGIN, "sample_packing": True},
    "half tails": {"plugins": HALF_TAILS},
    "a head that cannot be read": DORA,
    "padding-free": {"dpo_padding_free": True, "edpo_prefix_sharing": False},
    "packed": {**PACKED, "edpo_prefix_sharing": False},
    "filtered margins": FILTERED,
    "half tails, margins": {**MARGIN, "plugins": HALF_TAILS},
    "lora": {**PACKED, **LORA},
    "lora on the head": LORA | {"lora_target_modules": ["q_proj", "lm_head"]},
    "saved head": {**LORA, "lora_modules_to_save": ["lm_head"]},
    "reference model beside an adapter": {**LORA, "rl_adapter_ref_model": True},
    "truncated answers": {"sequence_len": 64, "excess_length_strategy": "truncate"},
    "losses": {"dpo_loss_type": ["ipo", "sigmoid", "sft", "nca_pair"]},
    "weighted": {"dpo_use_weighting": True},
    "warmup from 0": {"warmup_steps": 3, "lr_scheduler": "linear"},
    "checkpointing": {"gradient_checkpointing": True},
    "repeated pairs": {"repeated": True},
}
KINDS = {
    "gemma2": ("gemma2", {"sliding_window": 7}),  # its logits are capped
    "granite": ("granite", {"logits_scaling": 3.0}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", tiny.EXPERTS),
}


class Runs:
    """Recipes over the parts, all with one cache."""

    def __init__(self, parts, folder: Path):
        self._parts, self.folder, self.cache = parts, folder, folder / "cache"

    def __call__(self, name: str, **keys):
        return tiny.train(self.folder, self.recipe(name, **keys))

    def recipe(self, name: str, **keys) -> dict:
        shared = {"dataset_prepared_path": str(self._parts["prepared"])}
        if keys.get("precompute_ref_log_probs") and keys.get("rl") != "dpo":
            shared["edpo_reference_cache"] = str(self.cache)
        pairs, model = self._parts["pairs"], keys.pop("model", self._parts["model"])
        if keys.pop("repeated", False):
            pairs = self.folder / "repeated.jsonl"
            rows = self._parts["pairs"].read_text().splitlines(keepends=True)
            pairs.write_text("".join([*rows[:30], *rows[:10]]))
        keys = {"num_epochs": 4, "adam_epsilon": 1e-4, **FIXED, **shared, **keys}
        keys["output_dir"] = str(self.folder / name)
        return tiny.recipe(self.folder, model, pairs, **keys)

    def same(self, **keys):
        """Trains with a live reference and with two numbers: the same weights."""
        trainer = self.same_logs(**keys)
        assert_same_weights(self.folder / "cached", self.folder / "live")
        return trainer

    def same_logs(self, **keys):
        """Trains with a live reference and with two numbers: the same losses.

        Returns:
            The trainer with two numbers.
        """
        live, cached = self("live", **keys), self("cached", **keys, **CACHED)
        names = {*tiny.logs(live)[0]} - {*tiny.logs(cached)[0]}
        assert names == {KL}
        # float32 has no more digits of losses above 1, nor of rewards
        tolerances = {"loss": 1e-6, "kl/beta": 1e-6}
        tolerances |= {"rewards/margins": 1e-5, "rewards/chosen": 1e-5}
        for name, close in tolerances.items():
            expected = pytest.approx(logged(live, name), abs=close, rel=2e-6)
            assert logged(cached, name) == expected, name
        assert max(map(abs, logged(live, "rewards/margins"))) > 0.01
        return cached

    def shards(self) -> dict[Path, int]:
        """The files of the cache, and when they were written."""
        files = self.cache.rglob("*.safetensors")
        return {path: path.stat().st_mtime_ns for path in files}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in tiny.logs(trainer) if name in entry]


def logged_kl(trainer) -> list[float]:
    return [e[f"eval_{KL}"] for e in tiny.logs(trainer, f"eval_{KL}") if e["step"]]


@pytest.fixture
def runs(parts, tmp_path):
    return Runs(parts, tmp_path)


@pytest.mark.parametrize("option", first([*OPTIONS]))
def test_the_steps_are_those_of_a_live_reference(runs, option):
    """Twenty steps, or ten: losses, margins and weights within 1e-6; no states kept."""
    epochs = 4 if option == "padded" else 2
    trainer = runs.same(**OPTIONS[option], num_epochs=epochs)
    assert len(tiny.logs(trainer)) == 5 * epochs
    assert trainer.ref_model is None and trainer.reference.kept_head is None
    (file,) = runs.shards()
    tensors = load_file(file)
    pairs = 30 if "repeated" in OPTIONS[option] else 40
    assert tensors["logps"].shape == (2 * pairs,) and "hidden" not in tensors
    assert file.stat().st_size < 1024 + 56 * pairs


@rest
def test_qlora_begins_as_with_a_live_reference(runs):
    """Its kernels round within a layer, so a last digit grows from step to step."""
    runs.same_logs(**PACKED, **NF4 | {"bf16": False}, max_steps=4)


@rest
@pytest.mark.parametrize("kind", KINDS)
def test_other_heads_and_bodies(runs, tmp_path, kind):
    name, config = KINDS[kind]
    model = tiny.save_model(tmp_path / kind, name, **config)
    runs.same(model=model, max_steps=6)


def test_the_numbers_are_those_of_trl(runs):
    """`rl: dpo` with `precompute_ref_log_probs: true` adds two columns to the data."""
    theirs = tiny.build(
        runs.folder, runs.recipe("trl", **DPO, edpo_control=None, **CACHED)
    )
    columns = theirs.train_dataset
    ours = runs("ours", max_steps=1, **CACHED)
    assert len(columns) == 40
    for pair in columns:
        kept = torch.cat(ours.reference.cache.read(pair_digest(pair))).tolist()
        expected = [pair["ref_chosen_logps"], pair["ref_rejected_logps"]]
        # theirs are sums in float32
        assert kept == pytest.approx(expected, abs=1e-5, rel=2e-7)
        assert max(kept) < -5


def test_hidden_states_that_are_there_are_used_and_kl_is_logged(runs):
    runs("epsilon", edpo_control=None, edpo_epsilon=0.05, max_steps=1, **CACHED)
    before = runs.shards()
    live, cached = runs("live", num_epochs=1), runs("cached", num_epochs=1, **CACHED)
    assert runs.shards() == before and cached.reference.knows_tokens
    for name in ("loss", KL):
        expected = logged(live, name)
        assert logged(cached, name) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@rest
def test_hidden_states_of_some_pairs_are_not_enough(runs, parts):
    """Evaluation brings new pairs: then all get numbers, and no state is computed."""
    runs("epsilon", edpo_control=None, edpo_epsilon=0.05, max_steps=1, **CACHED)
    before = runs.shards()
    keys = dict(test_datasets=tiny.dataset(parts["eval"]), eval_steps=2, max_steps=4)
    live, cached = runs("live", **keys), runs("cached", **keys, **CACHED)
    after = runs.shards()
    (new,) = after.keys() - before.keys()
    assert before.items() <= after.items() and load_file(new)["logps"].shape == (100,)
    own, other = (tiny.logs(trainer, "eval_loss") for trainer in (cached, live))
    assert own[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert len(own) == 3 and {*other[0]} - {*own[0]} == {f"eval_{KL}"}
    for name in ("eval_loss", "eval_rewards/margins"):
        expected = [entry[name] for entry in other]
        assert [entry[name] for entry in own] == pytest.approx(expected, abs=1e-6)


def test_a_bound_of_the_kl_needs_hidden_states(runs):
    trainer = runs("bounded", edpo_max_kl=100.0, max_steps=1, **CACHED)
    assert trainer.reference.knows_tokens and len(logged(trainer, KL)) == 1


@rest
def test_a_best_checkpoint_by_kl_needs_hidden_states(runs, parts):
    keys = dict(metric_for_best_model=f"eval_{KL}", greater_is_better=False)
    keys |= dict(test_datasets=tiny.dataset(parts["eval"]), eval_steps=1, max_steps=2)
    keys |= dict(save_steps=1, save_strategy="steps", load_best_model_at_end=True)
    trainer = runs("best", **keys, **CACHED)
    assert trainer.reference.knows_tokens and len(logged(trainer, KL)) == 2
    assert trainer.state.best_metric == min(logged_kl(trainer))


@rest
@pytest.mark.parametrize("cache", ["there", "lost"])
def test_a_resumed_run_goes_on(runs, cache):
    """Its policy is another; the reference of the pass is not."""
    keys = dict(save_strategy="steps", save_steps=4, num_epochs=2, **CACHED)
    whole = runs("whole", **keys)
    if cache == "lost":
        for path in runs.shards():
            path.unlink()
    checkpoint = str(runs.folder / "whole" / "checkpoint-4")
    resumed = runs("resumed", **keys, resume_from_checkpoint=checkpoint)
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    assert_same_weights(runs.folder / "resumed", runs.folder / "whole")


@rest
def test_tails_of_another_weight_have_numbers_of_their_own(runs):
    """A run finds those of its own `dpo_ld_alpha` again."""
    for _ in range(2):
        runs("whole", max_steps=1, **CACHED)
        runs("half", max_steps=1, plugins=HALF_TAILS, **CACHED)
        names = sorted(path.parent.name for path in runs.shards())
        assert names == ["answer_logps", "answer_logps-ld-0.5"]


@rest
def test_a_cache_of_something_else_is_refused(runs, monkeypatch):
    """The last guard: everything says that it is this reference's, but it is not."""
    runs("first", max_steps=1, **CACHED)
    other = tiny.save_model(runs.folder / "other", initializer_range=0.3, rope_theta=9)
    folder = next(iter(runs.shards())).parent.parent.name
    monkeypatch.setattr(provider, "fingerprint_of", lambda *_, **__: folder)
    with pytest.raises(ValueError, match="nats per token away .* remove the folder"):
        runs("second", model=other, max_steps=1, **CACHED)


def test_trace_and_report_leave_kl_out(runs):
    keys = dict(edpo_log_pairs=1, max_steps=3, save_strategy="steps", save_steps=3)
    trainer = runs("traced", **keys, **CACHED)
    trace = pandas.read_parquet(runs.folder / "traced" / "edpo_pairs")
    assert len(trace) == 24 and trace["kl"].isna().all()
    assert trace["margin"].notna().all() and trace["margin"].abs().max() > 0
    assert not logged(trainer, KL)
    report = page.read([runs.folder / "traced"])
    written = page.write(report, runs.folder / "report")[0].read_text()
    assert "Reward margin" in written and "KL(π‖π_ref) per token" not in written
    assert KL not in json.dumps(page.as_json(report), allow_nan=False)
