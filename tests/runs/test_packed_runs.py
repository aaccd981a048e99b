"""Packing changes the speed and nothing else: whole runs, by axolotl's own loop."""

import dataclasses

import pytest
import torch
from helpers import tiny
from helpers.tiers import first, only
from helpers.tiny import LORA, NF4
from helpers.weights import assert_same_weights

from axolotl_edpo.data.completions import chosen_minus_rejected, sum_per_sequence
from axolotl_edpo.data.layout import LayoutSettings
from axolotl_edpo.trainer import EDPOTrainer
from axolotl_edpo.training.records import StepRecords

MODES = {
    "padding-free": {"dpo_padding_free": True, "edpo_prefix_sharing": False},
    "packed": {"sample_packing": True, "edpo_prefix_sharing": False},
    "shared": {"sample_packing": True},
}
# `make test` takes the mode that packs, deals and shares.
SHARED_FIRST = only([*MODES], lambda mode: mode == "shared")
MODELS = {  # windows shorter than any sequence
    "llama": {},
    "qwen2": {"vocab_size": 288},  # more than its tokenizer, as the real ones have
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7},
}


@dataclasses.dataclass
class Watched:
    """What a run computed, pair by pair."""

    seen: dict[tuple, list[float]]
    steps: dict[tuple, int]
    rows: list[int]
    trainer: EDPOTrainer

    @property
    def betas(self) -> list[float]:
        return [entry["kl/beta"] for entry in tiny.logs(self.trainer)]

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.trainer.model.named_parameters())


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Trains a recipe; keeps log-probabilities, Δ± and steps of every pair."""
    seen, steps, rows = {}, {}, []
    add = StepRecords.add

    def watched(self, mode, step, batch, stats, pairs, router_loss):
        add(self, mode, step, batch, stats, pairs, router_loss)
        if mode == "eval":
            return
        tokens = batch["targets"].split(batch["lengths"].tolist())
        sums = [
            sum_per_sequence(values.detach(), batch["lengths"])
            for values in (stats.policy_logp, stats.plus, stats.minus)
        ]
        deltas = [chosen_minus_rejected(values).tolist() for values in sums[1:]]
        count = len(pairs.steps)
        rows.append(count)
        for i in range(count):
            answers = tuple(tokens[i].tolist()), tuple(tokens[count + i].tolist())
            key = (step - 1, *answers)
            logps = [sums[0][i].item(), sums[0][count + i].item()]
            seen[key] = [*logps, deltas[0][i], deltas[1][i]]
            steps[key] = pairs.steps[i].item()

    monkeypatch.setattr(StepRecords, "add", watched)

    def train(keys):
        for store in (seen, steps, rows):
            store.clear()
        trainer = tiny.train(tmp_path, keys)
        return Watched(dict(seen), dict(steps), list(rows), trainer)

    return train


def messages(caplog, part: str) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if part in line]


def assert_same_run(run: Watched, padded: Watched) -> None:
    assert run.trainer.state.global_step == padded.trainer.state.global_step
    assert run.seen.keys() == padded.seen.keys()
    own = torch.tensor([run.seen[key] for key in padded.seen]).double()
    other = torch.tensor(list(padded.seen.values())).double()
    scale = other.abs().amax(dim=0)
    error = (own - other).abs()
    assert (error[:, :2] <= 1e-5 * other[:, :2].abs()).all()
    assert (error[:, 2:] <= 1e-5 * scale[2:]).all()
    # a decision is within rounding if Δ is, unless it is 0 because the policies are
    deltas = other[:, 2:].abs()
    decided = ((deltas > 1e-5 * scale[2:]) | (deltas == 0)).all(dim=1).tolist()
    assert sum(decided) >= 0.98 * len(decided)
    for key, clear in zip(padded.steps, decided, strict=True):
        assert run.steps[key] == padded.steps[key] or not clear
    assert run.betas == (padded.betas if all(decided) else pytest.approx(padded.betas))
    weights = run.weights()
    for name, value in padded.weights().items():
        assert (weights[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
@pytest.mark.parametrize("kind", first([*MODELS]))
def test_twenty_steps_are_the_same_in_every_mode(watch, parts, tmp_path, kind, adapter):
    model = tiny.save_model(tmp_path / "model", kind, **MODELS[kind])

    def run(**mode):
        keys = dict(num_epochs=4, adam_epsilon=1e-4, **adapter, **mode)
        return watch(tiny.recipe(tmp_path, model, parts["pairs"], **keys))

    padded = run()
    assert padded.trainer.state.global_step == 20 and len(padded.seen) == 160
    assert {-1, 0, 1} == set(padded.steps.values())
    for mode in MODES.values():
        assert_same_run(run(**mode), padded)


EAGER = {"attn_implementation": "eager"}
CHECKPOINTING = {"gradient_checkpointing": True}
OPTIONS = {
    "eager": EAGER,
    "reentrant": {
        **CHECKPOINTING,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "non-reentrant": {
        **CHECKPOINTING,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "lora-reentrant": {
        **LORA,
        **CHECKPOINTING,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "pad_to_multiple_of": {"pad_to_multiple_of": 64},
    "smoothed-penalized": {"dpo_label_smoothing": 0.1, "edpo_length_penalty": 0.03},
}


@pytest.mark.parametrize("mode", SHARED_FIRST)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_work_in_every_mode(recipe, watch, option, mode):
    keys = dict(max_steps=3, adam_epsilon=1e-2, **OPTIONS[option])
    padded = watch(recipe(**keys))
    assert_same_run(watch(recipe(**keys, **MODES[mode])), padded)


@pytest.mark.parametrize("mode", SHARED_FIRST)
def test_nf4_in_bfloat16_starts_at_exactly_zero_and_trains(recipe, tmp_path, mode):
    keys = {**NF4, "gradient_checkpointing": True, "max_steps": 3}
    keys["learning_rate"] = 2e-2  # so that three steps are more than rounding
    first, second, third = tiny.logs(
        tiny.train(tmp_path, recipe(**keys, **MODES[mode]))
    )
    assert first["kl/p_epsilon_steps"] == first["kl/n_epsilon_steps"] == 0.0
    assert first["kl/policy_ref"] == first["rewards/margins"] == 0.0
    padded = tiny.logs(tiny.train(tmp_path, recipe(**keys)))[2]
    assert third["logps/chosen"] == pytest.approx(padded["logps/chosen"], rel=1e-3)
    for name in ("kl/policy_ref", "grad_norm"):
        assert third[name] == pytest.approx(padded[name], rel=0.1) != 0, name


def test_over_long_pairs_are_the_same_in_every_mode_and_counted_once(
    watch, parts, tmp_path, caplog
):
    """TRL drops pairs whose prompt fills `sequence_len` and truncates answers."""
    keys = dict(sequence_len=50, skip_prepare_dataset=True, max_steps=3)
    runs = {}
    for mode, more in {"padded": {}, **MODES}.items():
        caplog.clear()
        recipe = tiny.recipe(
            tmp_path, tmp_path / "model", parts["pairs"], **keys, **more
        )
        tiny.save_model(tmp_path / "model")
        runs[mode] = watch(recipe)
        (line,) = messages(caplog, "dropped")
        data = runs[mode].trainer.train_dataset
        ends = [
            len(row["prompt_ids"])
            + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in data
        ]
        long = sum(end > 50 for end in ends)
        assert 0 < len(data) < 40 and 0 < long < len(data)
        assert line == (
            f"train set, `sequence_len: 50`: {40 - len(data)} of 40 pairs dropped (the "
            f"prompt alone fills it), {long} truncated (an answer ends after it)."
        )
    for mode in MODES:
        assert_same_run(runs[mode], runs["padded"])


@pytest.mark.parametrize("mode", SHARED_FIRST)
def test_a_partial_last_window_counts_the_pairs_that_were_there(recipe, watch, mode):
    """40 pairs in micro-batches of 3, windows of 4: 12, 12, 12, then 3 + 1."""
    keys = dict(micro_batch_size=3, gradient_accumulation_steps=4, adam_epsilon=1e-4)
    padded, own = watch(recipe(**keys)), watch(recipe(**keys, **MODES[mode]))
    assert len(own.rows) == 14 and sum(own.rows[:4]) == 12 and sum(own.rows[12:]) == 4
    assert_same_run(own, padded)


def test_logs_schedule_and_epochs_stay_what_they_were(recipe, watch):
    keys = dict(num_epochs=2, lr_scheduler="cosine", warmup_steps=2, adam_epsilon=1e-4)
    padded = tiny.logs(watch(recipe(**keys)).trainer, "loss")
    packed = tiny.logs(watch(recipe(**keys, sample_packing=True)).trainer, "loss")
    assert len(packed) == len(padded) == 10
    for own, other in zip(packed, padded, strict=True):
        assert own.keys() == other.keys()
        for name in ("step", "epoch", "learning_rate", "num_tokens"):
            assert own[name] == other[name]
        for name in own:
            assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "keys", first([{"sample_packing": True}, {"dpo_padding_free": True}])
)
def test_a_resume_in_the_middle_of_an_epoch_goes_on(recipe, tmp_path, keys):
    keys = dict(num_epochs=2, save_steps=3, save_strategy="steps", **keys)
    straight, out = tmp_path / "straight", tmp_path / "out"
    whole = tiny.train(tmp_path, recipe(**keys, output_dir=str(straight)))
    tiny.train(tmp_path, recipe(**keys, max_steps=3))
    checkpoint = str(out / "checkpoint-3")
    resumed = tiny.train(tmp_path, recipe(**keys, resume_from_checkpoint=checkpoint))
    assert [e["kl/beta"] for e in tiny.logs(resumed)] == [
        e["kl/beta"] for e in tiny.logs(whole)
    ]
    assert_same_weights(straight / "checkpoint-9", out / "checkpoint-9")


def evaluations(trainer) -> list[dict]:
    timing = ("runtime", "second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timing)}
        for entry in tiny.logs(trainer, "eval_loss")
    ]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({"eval_sample_packing": True}, 1),
        ({"sample_packing": True}, 1),
        ({"sample_packing": True, "eval_sample_packing": False}, 8),
        ({"dpo_padding_free": True}, 1),
    ],
)
def test_evaluation_packs_as_asked_and_says_the_same(
    recipe, parts, tmp_path, keys, rows
):
    """10 pairs in batches of 4: the last one has 2."""
    common = dict(max_steps=2, eval_steps=1, test_datasets=tiny.dataset(parts["eval"]))
    padded = tiny.train(tmp_path, recipe(**common))
    trainer = tiny.train(tmp_path, recipe(**common, **keys))
    laid = trainer.batcher.collators["eval"](list(trainer.eval_dataset)[:4])
    assert len(laid["input_ids"]) == rows
    for own, other in zip(evaluations(trainer), evaluations(padded), strict=True):
        for name in other:
            assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_trl_does_not_say_that_padding_free_is_off(recipe, tmp_path, caplog):
    trainer = tiny.train(tmp_path, recipe(dpo_padding_free=True, max_steps=1))
    assert "padding_free=True" not in caplog.text
    assert trainer.batcher.layout.packs and not trainer.batcher.layout.balances


def test_dealing_evens_out_the_tokens_of_micro_batches(recipe, tmp_path):
    keys = dict(micro_batch_size=2, gradient_accumulation_steps=4)
    trainer = tiny.train(tmp_path, recipe(**keys, sample_packing=True, max_steps=1))
    loader = iter(trainer.get_train_dataloader())
    before = trainer.records.metrics.tokens
    batches, held = trainer.get_batch_samples(loader, 4, torch.device("cpu"))
    tokens = [batch["input_ids"].numel() for batch in batches]
    chosen = sum(batch["lengths"].chunk(2)[0].sum() for batch in batches)
    assert held.tolist() == [8, chosen] and max(tokens) <= 1.25 * sum(tokens) / 4
    trained_on = sum(batch["num_tokens"] for batch in batches)
    assert trained_on == trainer.records.metrics.tokens - before > sum(tokens)


def test_masks_are_gone_after_the_micro_batch_that_they_are_for(recipe, tmp_path):
    trainer = tiny.build(tmp_path, recipe(sample_packing=True))
    loader = iter(trainer.get_train_dataloader())
    batches, held = trainer.get_batch_samples(loader, 2, torch.device("cpu"))
    for batch in batches:
        trainer.training_step(trainer.model, batch, held)
        cache = batch["segments"].cache
        assert cache.windows == {None} and not cache.entries


@pytest.fixture
def state_space_model(tmp_path):
    """A model that carries a state from one sequence of a row to the next.

    No Mamba: axolotl 0.20 and 0.21 load that only where torchvision is installed.
    """
    return str(tiny.save_model(tmp_path / "hybrid", "falcon_h1", **tiny.FALCON_H1))


@pytest.mark.parametrize("key", ["sample_packing", "dpo_padding_free"])
def test_a_model_that_mixes_sequences_is_refused_before_it_is_loaded(
    recipe, tmp_path, state_space_model, key
):
    (tmp_path / "hybrid" / "model.safetensors").write_bytes(b"not weights")
    keys = recipe(base_model=state_space_model, **{key: True})
    with pytest.raises(ValueError, match=f"`{key}: true`.*carry a state.*auto"):
        tiny.train(tmp_path, keys)


def test_under_auto_it_runs_padded_with_one_line_saying_so(
    recipe, tmp_path, state_space_model, caplog
):
    keys = dict(base_model=state_space_model, sample_packing="auto", max_steps=2)
    trainer = tiny.train(tmp_path, recipe(**keys, attn_implementation=None))
    (line,) = messages(caplog, "batches are padded")
    assert line.startswith("`sample_packing: auto`: batches are padded, as it has")
    assert trainer.batcher.layout == LayoutSettings(shares=False)
    assert tiny.logs(trainer)[-1]["kl/policy_ref"] > 0


def test_an_attention_without_boundaries_is_refused(recipe, tmp_path, monkeypatch):
    """One that takes every keyword and heeds none of them."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def deaf(*args, segments=None, **keywords):
        return sdpa_attention_forward(*args, **keywords)

    deaf.packs = True
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", deaf)
    with pytest.raises(ValueError, match="sample_packing: true.*sequences in one row"):
        tiny.train(tmp_path, recipe(sample_packing=True))
    caught = tiny.train(tmp_path, recipe(sample_packing="auto", max_steps=1))
    assert caught.batcher.layout == LayoutSettings(shares=False)


def test_plain_dpo_is_the_same_to_the_bit_after_a_packed_run(recipe, tmp_path):
    dpo = {**tiny.DPO, "max_steps": 2}
    before = tiny.logs(tiny.train(tmp_path, recipe(**dpo)), "loss")
    tiny.train(tmp_path, recipe(sample_packing=True, max_steps=1))
    after = tiny.logs(tiny.train(tmp_path, recipe(**dpo)), "loss")
    assert [e["loss"] for e in before] == [e["loss"] for e in after]
    assert [e["grad_norm"] for e in before] == [e["grad_norm"] for e in after]


# last, as what the compiler leaves makes garbage collection slow
COMPILED = {
    "lora": {**LORA, "torch_compile": True, "torch_compile_backend": "eager"},
    "checkpointing": {
        **CHECKPOINTING,
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
    },
}


@pytest.mark.parametrize(
    ("option", "mode"),
    first([(option, mode) for option in COMPILED for mode in reversed(["", *MODES])]),
)
def test_compiled_layers_work_in_every_mode(recipe, watch, option, mode):
    keys = dict(max_steps=3, adam_epsilon=1e-2, **COMPILED[option])
    plain = watch(
        recipe(**{**keys, "torch_compile": None, "torch_compile_backend": None})
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_same_run(watch(recipe(**keys, **MODES.get(mode, {}))), plain)
    frames = torch._dynamo.utils.counters["frames"]
    assert 0 < frames["ok"] == frames["total"] < 30  # no batch is a new graph
