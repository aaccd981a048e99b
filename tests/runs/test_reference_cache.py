"""`precompute_ref_log_probs`: the run is the same, without the reference's forward."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from axolotl.evaluate import evaluate
from helpers import tiny
from helpers.tiers import first, only
from helpers.tiny import CACHED, LORA, NF4
from helpers.weights import assert_same_weights
from safetensors import safe_open
from safetensors.torch import load_file

from axolotl_edpo.reference import cacheable, fingerprint, precompute, provider
from axolotl_edpo.reference.cached_read import CachedRead
from axolotl_edpo.trainer import EDPOTrainer
from axolotl_edpo.training import assembly

PACKED = {"sample_packing": True}
# float32 around NF4: equal to the last digits; with bf16 only as far as that rounds
NF4_FLOAT32 = {**NF4, "bf16": False}
OPTIONS = {
    "padded": {},
    "padding-free": {"dpo_padding_free": True, "edpo_prefix_sharing": False},
    "packed": {**PACKED, "edpo_prefix_sharing": False},
    "shared": PACKED,
    "lora": {**PACKED, **LORA},
    "lora on the head": LORA | {"lora_target_modules": ["q_proj", "lm_head"]},
    "saved head": {**LORA, "lora_modules_to_save": ["lm_head"]},
    "reference model beside an adapter": {**LORA, "rl_adapter_ref_model": True},
    "qlora": {**PACKED, **NF4_FLOAT32},
    "frozen head": {"unfrozen_parameters": ["^model.layers.1.mlp.up_proj.weight$"]},
    "warmup from 0": {"warmup_steps": 3, "lr_scheduler": "linear"},
    "checkpointing": {"gradient_checkpointing": True},
    "sft": {"dpo_loss_type": ["sigmoid", "sft"]},
    "weighted": {"dpo_use_weighting": True},
    "truncated answers": {"sequence_len": 64, "excess_length_strategy": "truncate"},
    "loader processes": {"dataloader_num_workers": 1, **PACKED},
    "added tokens": {"special_tokens": {"pad_token": "<new>"}},
}
# Those that `make test` leaves out: other rows, other places of an adapter, and what
# changes the policy's run only.
LATER = (
    "padding-free",
    "packed",
    "lora on the head",
    "checkpointing",
    "sft",
    "loader processes",
    "added tokens",
)


def pairs_in(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return file.get_slice("pairs").get_shape()[0]


def used(trainer) -> list[tuple]:
    """What decides, of every step."""
    names = ("kl/beta", "kl/p_epsilon_steps", "kl/n_epsilon_steps")
    return [tuple(entry[name] for name in names) for entry in tiny.logs(trainer)]


class Runs:
    """Recipes over the parts, all with one cache."""

    def __init__(self, parts, folder: Path):
        self._parts, self.folder, self.cache = parts, folder, folder / "cache"

    def __call__(self, name: str, **keys):
        own = self.folder / name
        own.mkdir(exist_ok=True)
        return tiny.train(own, self._recipe(own, **keys))

    def evaluate(self, **keys) -> dict[str, float]:
        """As `axolotl evaluate` does; the metrics of the evaluation set."""
        cfg = tiny.load_config(self.folder, self._recipe(self.folder, **keys))
        return evaluate(cfg=cfg, dataset_meta=tiny.load_data(cfg))

    def _recipe(self, own: Path, **keys) -> dict:
        shared = {"dataset_prepared_path": str(self._parts["prepared"])}
        if keys.get("precompute_ref_log_probs"):
            shared["edpo_reference_cache"] = str(self.cache)
        model = keys.pop("model", self._parts["model"])
        pairs = keys.pop("pairs", self._parts["pairs"])
        keys = {"num_epochs": 2, "adam_epsilon": 1e-4, **shared, **keys}
        return tiny.recipe(own, model, pairs, **keys)

    def same(self, **keys):
        """Trains with and without a cache; asserts that it is the same run.

        Returns:
            The trainer with the cache.
        """
        live, cached = self("live", **keys), self("cached", **keys, **CACHED)
        assert used(cached) == used(live)
        assert used(live)[0][1:] == (0, 0) and used(live)[-1][0] != 0.1
        for name in ("loss", "kl/policy_ref", "rewards/margins", "num_tokens"):
            own, other = (
                [entry[name] for entry in tiny.logs(t)] for t in (cached, live)
            )
            assert own == pytest.approx(other, rel=1e-4, abs=1e-6), name
        assert_same_weights(
            *(self.folder / name / "out" for name in ("live", "cached"))
        )
        return cached

    def shards(self) -> dict[Path, int]:
        """The files of the cache, and when they were written."""
        return {
            path: path.stat().st_mtime_ns for path in self.cache.rglob("*.safetensors")
        }


@pytest.fixture
def runs(parts, tmp_path):
    return Runs(parts, tmp_path)


@pytest.fixture(scope="module")
def first_cache(parts, tmp_path_factory):
    """The cache of a run of one step."""
    runs = Runs(parts, tmp_path_factory.mktemp("first"))
    runs("first", max_steps=1, **CACHED)
    return runs.cache


@pytest.fixture
def filled(first_cache, runs):
    """Runs whose cache a run of one step has filled."""
    shutil.copytree(first_cache, runs.cache)
    return runs


@pytest.mark.parametrize("option", only([*OPTIONS], lambda o: o not in LATER))
def test_a_cache_changes_nothing(runs, option):
    """Steps and β exactly, weights within 1e-6; in the first step, too."""
    assert runs.same(**OPTIONS[option]).ref_model is None


KINDS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"sliding_window": 7}),  # its logits are capped
    "mixtral": ("mixtral", tiny.EXPERTS),
    "granite": ("granite", {"logits_scaling": 3.0}),
}


@pytest.mark.parametrize("kind", first([*KINDS], 2))
@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
def test_other_heads_and_bodies(runs, tmp_path, kind, adapter):
    name, config = KINDS[kind]
    model = tiny.save_model(tmp_path / kind, name, **config)
    runs.same(model=model, **adapter, max_steps=6)


def test_evaluation_reads_the_cache_too(runs, parts):
    keys = dict(test_datasets=tiny.dataset(parts["eval"]), eval_steps=2, max_steps=4)
    live, cached = runs("live", **keys), runs("cached", **keys, **CACHED)
    own, other = (tiny.logs(trainer, "eval_loss") for trainer in (cached, live))
    assert len(own) == 3  # before the first step, where it is log 2, and twice after
    assert own[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert own[0]["eval_kl/p_epsilon_steps"] == own[0]["eval_kl/policy_ref"] == 0
    for name in ("eval_loss", "eval_kl/policy_ref", "eval_kl/p_epsilon_steps"):
        expected = [entry[name] for entry in other]
        assert [entry[name] for entry in own] == pytest.approx(expected, rel=1e-5)


def test_an_adapter_is_evaluated_against_what_is_below_it(runs, parts):
    """`axolotl evaluate --lora-model-dir`: no step was made, and they differ."""
    runs("first", **LORA, max_steps=3)
    keys = dict(LORA, lora_model_dir=str(runs.folder / "first" / "out"))
    keys |= dict(test_datasets=tiny.dataset(parts["eval"]))
    live, cached = (runs.evaluate(**keys, **more) for more in ({}, CACHED))
    assert live["eval_kl/policy_ref"] > 0
    for name in ("loss", "kl/policy_ref", "kl/p_epsilon_steps", "rewards/margins"):
        name = f"eval_{name}"
        assert cached[name] == pytest.approx(live[name], rel=1e-5, abs=1e-7)


def test_evaluation_without_a_reference_gives_zeros(runs, parts):
    metrics = runs.evaluate(test_datasets=tiny.dataset(parts["eval"]), **CACHED)
    assert metrics["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert metrics["eval_kl/policy_ref"] == metrics["eval_rewards/margins"] == 0.0


def test_an_adapter_that_is_trained_further_is_compared_with_its_start(runs):
    runs("first", **LORA, max_steps=3)
    start = str(runs.folder / "first" / "out")
    runs.same(**LORA, lora_model_dir=start)


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
@pytest.mark.parametrize("cache", ["there", "lost"])
def test_a_resumed_run_goes_on(runs, adapter, cache):
    """Its policy is another; the reference of the pass is not."""
    keys = dict(save_strategy="steps", save_steps=4, **adapter, **CACHED)
    whole = runs("whole", **keys)
    if cache == "lost":
        for path in runs.shards():
            path.unlink()
    checkpoint = runs.folder / "whole" / "out" / "checkpoint-4"
    resumed = runs("resumed", **keys, resume_from_checkpoint=str(checkpoint))
    assert used(resumed) == used(whole)
    assert_same_weights(runs.folder / "resumed/out", runs.folder / "whole/out")


# --- which cache it is -------------------------------------------------------------


def test_sweeps_pay_once(filled):
    """β, ε, learning rate, rows, engine, seed and adapter are none of its business."""
    shards = filled.shards()
    for number, keys in enumerate(
        (
            {"beta": 0.5, "edpo_epsilon": 0.1, "learning_rate": 1e-4},
            {**PACKED, "seed": 11, "micro_batch_size": 2},
            {**LORA, "lora_r": 2},
            {"dpo_loss_type": ["ipo"], "warmup_steps": 1},
        )
    ):
        filled(f"run{number}", max_steps=1, **keys, **CACHED)
    assert filled.shards() == shards and len(shards) == 1


def test_rows_share_an_attention_that_packing_gives_another_name(runs):
    keys = dict(attn_implementation="eager", max_steps=1, **CACHED)
    runs("padded", **keys)
    shards = runs.shards()
    runs("packed", **keys, **PACKED)
    assert runs.shards() == shards and len(shards) == 1


def test_evaluation_finds_the_cache_of_the_training(runs, parts):
    """transformers gives a model its tokenizer's tokens as it begins to train."""
    folder = runs.folder / "padless"
    shutil.copytree(parts["model"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    keys = dict(model=folder, test_datasets=tiny.dataset(parts["eval"]), **CACHED)
    runs("first", max_steps=1, **keys)
    shards = runs.shards()
    runs.evaluate(**keys)
    assert runs.shards() == shards and len(shards) == 1


def test_only_pairs_that_are_new_are_computed(filled, parts, tmp_path):
    before = filled.shards()
    more = tmp_path / "more.jsonl"
    more.write_text(parts["pairs"].read_text() + parts["eval"].read_text())
    trainer = filled("more", max_steps=1, pairs=more, **CACHED)
    assert len(trainer.train_dataset) == 50
    after = filled.shards()
    assert before.items() <= after.items() and len(after) == 2
    (new,) = after.keys() - before.keys()
    assert pairs_in(new) == 10


OTHERS = {
    "weights": lambda folder: {"model": tiny.save_model(folder, initializer_range=0.2)},
    "one weight": lambda folder: {"model": nudged(folder)},
    "config": lambda folder: {"model": tiny.save_model(folder, rms_norm_eps=1e-3)},
    "dtype": lambda folder: {"bf16": True},
    "attention": lambda folder: {"attn_implementation": "eager"},
    "truncation": lambda folder: {"sequence_len": 250},
    "4 bits": lambda folder: NF4_FLOAT32,
}


def nudged(folder: Path) -> Path:
    """The model of the tests, but for the last bits of one weight."""
    tiny.save_model(folder)
    model = tiny.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", OTHERS)
def test_another_reference_has_a_cache_of_its_own(filled, tmp_path, what):
    before = filled.shards()
    filled("second", max_steps=1, **CACHED, **OTHERS[what](tmp_path / "other"))
    after = filled.shards()
    assert before.items() <= after.items() and len(after) == 2
    assert len({path.parent for path in after}) == 2


@pytest.mark.parametrize("key", fingerprint.COMPUTE_KEYS)
def test_the_precision_of_products_is_part_of_it(parts, recipe, tmp_path, key):
    """They want a GPU, or a head that cannot be read: here only named."""
    cfg = tiny.load_config(tmp_path, recipe(**CACHED))
    lm = tiny.AutoModelForCausalLM.from_pretrained(parts["model"])

    def named(value) -> str:
        cfg[key] = value
        parts = precompute.CacheSettings.from_config(cfg).fingerprint_parts
        return fingerprint.fingerprint_of(lm, lm, torch.zeros(1, 32), **parts)

    assert named(True) == named(True) != named(None)


def test_an_adapter_that_counts_more_is_another_reference(runs):
    """One number of its config, and no weight."""
    runs("adapter", **LORA, max_steps=3)
    start = runs.folder / "adapter" / "out"
    keys = dict(**LORA, lora_model_dir=str(start), max_steps=1, **CACHED)
    runs("first", **keys)
    config = start / "adapter_config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps(written | {"lora_alpha": written["lora_alpha"] + 1}))
    runs("second", **keys)
    assert len({path.parent for path in runs.shards()}) == len(runs.shards()) == 2


CODE = """
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


def test_a_model_that_brings_its_code_is_another_with_other_code(runs, parts):
    folders = []
    for number, code in enumerate((CODE, CODE, CODE.replace("pass", "scale = 2"))):
        folders.append(folder := runs.folder / f"model{number}")
        shutil.copytree(parts["model"], folder)
        (folder / f"modeling_own{number}.py").write_text(code)
        config = json.loads((folder / "config.json").read_text())
        own = {"AutoModelForCausalLM": f"modeling_own{number}.OwnForCausalLM"}
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    named = [
        fingerprint.remote_code(
            tiny.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        )
        for folder in folders
    ]
    assert named[0] == named[1] == [CODE] != named[2]


def test_another_tokenizer_or_template_makes_other_pairs(filled):
    template = tiny.CHAT_TEMPLATE.replace("[{{ m['role'] }}]", "<{{ m['role'] }}>")
    keys = dict(chat_template="jinja", chat_template_jinja=template)
    filled("second", max_steps=1, **CACHED, **keys)
    assert [*map(pairs_in, filled.shards())] == [40, 40]


def test_a_cache_of_something_else_is_refused(filled, monkeypatch):
    """The last guard: everything says that it is this reference's, but it is not."""
    other = tiny.save_model(
        filled.folder / "other", initializer_range=0.15, rope_theta=9
    )
    keys = dict(model=other, max_steps=1, **CACHED)
    monkeypatch.setattr(provider, "fingerprint_of", lambda *_, **__: folder)
    folder = next(iter(filled.shards())).parent.name
    with pytest.raises(ValueError, match="of its norm away .* remove the folder"):
        filled("second", **keys)


def test_a_pair_of_no_data_set_is_refused(runs):
    trainer = runs("first", max_steps=1, **CACHED)
    strange = trainer.train_dataset.select(range(2)).map(
        lambda row: {"chosen": row["chosen"] + "."}
    )
    with pytest.raises(ValueError, match="a pair is in no data set of the recipe"):
        trainer.evaluate(strange)


# --- what it refuses ---------------------------------------------------------------


def test_a_head_that_cannot_be_read_has_no_cache(runs):
    dora = LORA | {"lora_target_modules": ["q_proj", "lm_head"], "peft_use_dora": True}
    with pytest.raises(ValueError, match="`precompute_ref_log_probs: true`.*head"):
        runs("first", **dora, **CACHED)


def test_positions_that_depend_on_other_pairs_have_no_cache(runs, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    rope["original_max_position_embeddings"] = 128
    model = tiny.save_model(tmp_path / "dynamic", rope_parameters=rope)
    with pytest.raises(ValueError, match="`sequence_len` up to 128"):
        runs("first", model=model, **CACHED)
    runs.same(model=model, sequence_len=128)


def test_positions_may_depend_on_other_pairs_in_some_layers():
    kinds = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    }
    kinds["sliding_attention"] = {"rope_type": "default", "rope_theta": 1e4}
    config = tiny.AutoConfig.for_model(
        "gemma3_text", rope_parameters=kinds, max_position_embeddings=64
    )
    cacheable.require_cacheable(config, True, max_length=64)
    with pytest.raises(ValueError, match="`sequence_len` up to 64"):
        cacheable.require_cacheable(config, True, max_length=65)


# --- what it saves -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [({}, provider.ModelReference), (LORA, provider.AdapterReference)],
    ids=["full", "lora"],
)
def test_the_reference_runs_once_per_pair_and_never_again(
    runs, monkeypatch, adapter, kind
):
    counts, states = [], []
    run, begin = kind.run, EDPOTrainer.prepare

    def prepared(self, model):
        states.append(self.state)
        begin(self, model)

    def counted(self, policy, batch):
        counts.append((states[-1].global_step, len(batch["lengths"]) // 2))
        return run(self, policy, batch)

    monkeypatch.setattr(EDPOTrainer, "prepare", prepared)
    monkeypatch.setattr(kind, "run", counted)
    runs("first", **adapter, **CACHED)
    assert {step for step, _ in counts} == {0}
    assert sum(pairs for _, pairs in counts) == 1 + 40  # one that is looked at
    counts.clear()
    runs("second", **adapter, **CACHED)
    assert counts == [(0, 1)]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_reference_model_is_freed_but_for_its_head(
    runs, parts, monkeypatch, compiled
):
    found, freed = {}, []
    release, fill = provider.ModelReference.release, assembly.fill_cache

    def filled(*args):
        fill(*args)
        freed.append(found["body"]() is None)  # before the first step

    def watched(self, keeps_head):
        lm = self.model
        found["body"] = weakref.ref(lm.model.layers[0].mlp.up_proj.weight)
        found["head"] = weakref.ref(lm.lm_head.weight)
        del lm
        return release(self, keeps_head)

    monkeypatch.setattr(provider.ModelReference, "release", watched)
    monkeypatch.setattr(assembly, "fill_cache", filled)
    keys = {"torch_compile": True, "torch_compile_backend": "eager"}
    keys = {**CACHED, **(keys if compiled else {}), "max_steps": 2}
    with mock.patch.dict(os.environ):  # axolotl tells accelerate of a compiler there
        trainer = runs("first", **keys)
    assert freed == [True]
    gc.collect()
    kept = trainer.reference.kept_head.weight
    assert found["body"]() is None
    assert found["head"]() is None  # a part of a mapped file, which would stay
    first = load_file(parts["model"] / "model.safetensors")
    assert torch.equal(kept, first["lm_head.weight"])
    frozen = runs(
        "second", unfrozen_parameters=["model.layers.1."], **CACHED, max_steps=2
    )
    gc.collect()
    assert found["head"]() is None and frozen.reference.kept_head is None


def test_reads_follow_each_other_and_only_two_are_in_memory(runs, monkeypatch):
    """The next is begun when one is used: training waits for the first at most."""
    begun, used_up = [], []
    start, given = CachedRead.start, CachedRead.given
    ahead = []

    def started(self):
        if self._future is None:
            begun.append(self)
        start(self)

    def taken(self, policy):
        hidden = given(self, policy)
        used_up.append(self)
        ahead.append(len(begun) - len(used_up))
        return hidden

    monkeypatch.setattr(CachedRead, "start", started)
    monkeypatch.setattr(CachedRead, "given", taken)
    trainer = runs(
        "first",
        micro_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
        **CACHED,
    )
    assert begun == used_up and len(begun) == 2 * 4  # not in the first step
    assert ahead == [1, 1, 1, 0] * 2
    assert 0 < trainer.reference.waited < 1
