"""Runs whose loss has no reference: one model, one forward per micro-batch.

Under engines: tests/engines, `test_without_a_reference_two_ranks_train_as_one`.
"""

import math

import pandas
import pytest
from axolotl.evaluate import evaluate
from helpers import tiny
from helpers.report_pages import page_of
from helpers.tiers import only
from helpers.tiny import LORA
from helpers.weights import assert_same_weights
from transformers import LlamaForCausalLM, LlamaModel, TrainerCallback

from axolotl_edpo.losses.reference_free import REFERENCE_FREE
from axolotl_edpo.reference.no_reference import NoReference
from axolotl_edpo.run_files import TRACE, WARNINGS

FIXED = dict(edpo_control="fixed", edpo_epsilon=None)
PACKED = {"sample_packing": True}


def keys_of(name: str) -> dict:
    """A loss, and all keys that it uses."""
    loss = REFERENCE_FREE[name]
    values = dict(beta=0.2, simpo_gamma=0.3, cpo_alpha=0.5, orpo_alpha=0.4)
    values["edpo_slic_delta"] = 3.0
    used = {key: value for key, value in values.items() if key in loss.keys}
    return {**FIXED, "beta": None, "dpo_loss_type": [name], **used}


class Counts(TrainerCallback):
    """Counts models that are loaded, and forwards of each optimizer step."""

    def __init__(self, monkeypatch):
        self.models, self.forwards, self.by_step = 0, 0, []
        self._count(monkeypatch, LlamaForCausalLM, "from_pretrained", "models")
        self._count(monkeypatch, LlamaModel, "forward", "forwards")

    def _count(self, monkeypatch, kind, method, name):
        call = getattr(kind, method)

        def counted(*args, **kwargs):
            setattr(self, name, getattr(self, name) + 1)
            return call(*args, **kwargs)

        monkeypatch.setattr(kind, method, counted)

    def on_step_begin(self, *args, **kwargs):
        self.forwards = 0

    def on_step_end(self, *args, **kwargs):
        self.by_step.append(self.forwards)


@pytest.fixture
def counts(monkeypatch):
    return Counts(monkeypatch)


@pytest.mark.parametrize(
    ("keys", "models", "forwards"),
    [
        (keys_of("simpo"), 1, 2),
        (keys_of("simpo") | LORA, 1, 2),
        (FIXED, 2, 4),
        (FIXED | LORA, 1, 4),
    ],
    ids=["full", "lora", "full, with reference", "lora, with reference"],
)
def test_no_second_model_is_loaded_and_no_reference_runs(
    recipe, counts, keys, models, forwards, tmp_path
):
    """Two micro-batches a step; with a reference, each runs twice."""
    trainer = tiny.build(tmp_path, recipe(**PACKED, **keys, max_steps=3))
    trainer.add_callback(counts)
    trainer.train()
    assert counts.models == models
    assert counts.by_step == [forwards] * 3
    if "dpo_loss_type" in keys:
        assert trainer.ref_model is None and isinstance(trainer.reference, NoReference)


def test_a_run_after_one_without_a_reference_has_its_own(recipe, counts, tmp_path):
    tiny.build(tmp_path, recipe(**keys_of("cpo")))
    assert counts.models == 1
    assert tiny.build(tmp_path, recipe(**FIXED)).ref_model is not None
    assert counts.models == 3


@pytest.mark.parametrize("name", only([*REFERENCE_FREE], lambda name: name == "orpo"))
def test_packed_pairs_train_as_padded_ones_and_a_run_learns(
    recipe, parts, name, tmp_path
):
    keys = dict(num_epochs=4, adam_epsilon=1e-4, eval_steps=10, **keys_of(name))
    keys |= dict(test_datasets=tiny.dataset(parts["eval"]))
    padded, packed = (
        tiny.train(tmp_path, recipe(**keys, **rows, output_dir=str(tmp_path / out)))
        for out, rows in (("padded", {}), ("packed", PACKED))
    )
    for beside in ("kl/beta", "eval_loss"):
        for a, b in zip(*(tiny.logs(t, beside) for t in (padded, packed)), strict=True):
            names = [n for n in a if n.endswith(("loss", "margins", "/chosen", "norm"))]
            assert len(names) >= 4 and "kl/policy_ref" not in a
            for n in names:
                assert a[n] == pytest.approx(b[n], rel=1e-4, abs=1e-5), n
    assert_same_weights(tmp_path / "padded", tmp_path / "packed")
    losses = [log["loss"] for log in tiny.logs(packed)]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert not [log for log in packed.state.log_history if WARNINGS in log]
    beta = 0.2 if "beta" in keys_of(name) and keys_of(name)["beta"] else 1.0
    assert {log["kl/beta"] for log in tiny.logs(packed)} == {beta}


def test_the_first_loss_is_the_formula_of_what_is_logged(recipe, tmp_path):
    """One pair per step: -log σ(margin - γ) + α NLL; logps are sums over tokens."""
    keys = dict(micro_batch_size=1, gradient_accumulation_steps=1, max_steps=3)
    trainer = tiny.train(tmp_path, recipe(**keys, **keys_of("simpo")))
    for log in tiny.logs(trainer):
        mean = log["rewards/chosen"] / 0.2  # log π per token
        loss = math.log1p(math.exp(0.3 - log["rewards/margins"])) - 0.5 * mean
        assert log["loss"] == pytest.approx(loss, rel=1e-6)
        tokens = log["logps/chosen"] / mean
        assert tokens == pytest.approx(round(tokens), abs=1e-4) and tokens > 2


def test_the_trace_and_the_report_do_without_a_reference(recipe, tmp_path):
    keys = dict(edpo_log_pairs=1, max_steps=3, **keys_of("rrhf"))
    keys |= dict(save_strategy="steps", save_steps=3)
    trainer = tiny.train(tmp_path, recipe(**keys))
    folder = tmp_path / "out"
    rows = pandas.concat(map(pandas.read_parquet, (folder / TRACE).iterdir()))
    assert len(rows) == 24 and rows["kl"].isna().all()
    assert {*rows["beta"]} == {1.0} and rows["step"].isna().all()
    first_step = rows[rows["global_step"] == 1]["margin"].mean()
    logged = tiny.logs(trainer)[0]["rewards/margins"]
    assert first_step == pytest.approx(logged, rel=1e-5)
    page = page_of(tmp_path / "page", folder)
    assert "(edpo_control: fixed)" in page.text()
    missing = "KL(π‖π_ref), shares of pairs for a smaller or larger β."
    assert f"Not logged by this run: {missing}" in page.text()


def test_an_adapter_that_is_trained_further_has_no_copy(recipe, tmp_path):
    adapter = tmp_path / "adapter"
    keys = LORA | keys_of("cpo")
    tiny.train(tmp_path, recipe(**keys, max_steps=1, output_dir=str(adapter)))
    again = recipe(**keys, max_steps=2, lora_model_dir=str(adapter))
    trainer = tiny.train(tmp_path, again)
    assert [*trainer.model.peft_config] == ["default"]
    assert [log["grad_norm"] > 0 for log in tiny.logs(trainer)] == [True, True]


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_axolotl_evaluate_loads_one_model_and_gives_the_last_eval_loss(
    recipe, parts, counts, adapter, tmp_path
):
    data = dict(test_datasets=tiny.dataset(parts["eval"]), eval_steps=2)
    keys = {**keys_of("simpo"), **data, **adapter}
    trainer = tiny.train(tmp_path, recipe(**keys, max_steps=2))
    *_, last = tiny.logs(trainer, "eval_loss")
    place = "lora_model_dir" if adapter else "base_model"
    counts.models = 0
    cfg = tiny.load_config(tmp_path, recipe(**keys) | {place: str(tmp_path / "out")})
    metrics = evaluate(cfg=cfg, dataset_meta=tiny.load_data(cfg))
    assert metrics["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert counts.models == 1
