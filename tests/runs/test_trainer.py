"""trainer.py through axolotl's own loader, builder and train loop, on tiny models."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from helpers import tiny
from helpers.killed_runs import train_until_killed
from helpers.tiers import first
from helpers.tiny import LORA, NF4
from helpers.weights import assert_same_weights, weights
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from axolotl_edpo.losses.beta_controller import EpsilonController
from axolotl_edpo.training.finite_checks import Diverged


@pytest.mark.parametrize(
    "keys",
    [{}, {"bf16": True}, {**LORA, "lora_dropout": 0.1}, NF4],
    ids=["float32", "bf16", "lora", "qlora-nf4"],
)
def test_equal_policy_and_reference_give_steps_of_exactly_zero(recipe, tmp_path, keys):
    trainer = tiny.train(tmp_path, recipe(**keys, max_steps=2))
    first, second = tiny.logs(trainer)
    assert first["kl/p_epsilon_steps"] == first["kl/n_epsilon_steps"] == 0.0
    assert first["kl/policy_ref"] == first["rewards/margins"] == 0.0
    assert first["kl/beta"] == second["kl/beta"] == 0.1
    assert second["kl/p_epsilon_steps"] + second["kl/n_epsilon_steps"] > 0


def test_tokens_that_are_added_are_the_same_in_policy_and_reference(
    recipe, tmp_path, caplog
):
    """axolotl resizes each of the two models at random, from one seed."""
    keys = recipe(special_tokens={"pad_token": "<new>"}, max_steps=1)
    (first,) = tiny.logs(tiny.train(tmp_path, keys))
    assert "loaded with different embeddings" not in caplog.text
    assert first["kl/p_epsilon_steps"] == first["kl/n_epsilon_steps"] == 0.0
    assert first["kl/policy_ref"] == first["rewards/margins"] == 0.0


def test_every_metric_is_logged_in_training_and_evaluation(recipe, parts, tmp_path):
    keys = recipe(test_datasets=tiny.dataset(parts["eval"]), eval_steps=2, max_steps=2)
    keys |= {"save_steps": 2, "save_strategy": "steps", "use_tensorboard": True}
    trainer = tiny.train(tmp_path, keys)
    expected = """kl/beta kl/avg_steps kl/p_epsilon_steps kl/n_epsilon_steps
    kl/policy_ref rewards/chosen rewards/rejected rewards/margins rewards/accuracies
    logps/chosen logps/rejected logits/chosen logits/rejected entropy num_tokens
    mean_token_accuracy loss""".split()
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    train = next(entry for entry in history if entry["step"] == 2 and "loss" in entry)
    evaluation = [entry for entry in history if "eval_loss" in entry][-1]
    assert set(expected) <= train.keys()
    assert {f"eval_{name}" for name in expected} <= evaluation.keys()
    events = EventAccumulator(
        str(next((tmp_path / "out").rglob("events.out*")).parent)
    ).Reload()
    reported = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in expected} <= reported
    assert {f"eval/{name}" for name in expected} <= reported
    assert evaluation["eval_kl/beta"] == trainer.controller.beta
    shares = [evaluation[f"eval_kl/{side}_epsilon_steps"] for side in "pn"]
    assert 0 < sum(shares) <= 1
    assert evaluation["eval_kl/avg_steps"] == pytest.approx(shares[0] - shares[1])


def test_evaluation_uses_the_current_beta_and_never_changes_it(recipe, parts, tmp_path):
    keys = dict(max_steps=4, test_datasets=tiny.dataset(parts["eval"]), eval_steps=1)
    with_eval = tiny.train(tmp_path, recipe(**keys))
    evaluations = tiny.logs(with_eval, "eval_loss")
    betas = {entry["step"]: entry["eval_kl/beta"] for entry in evaluations}
    without = tiny.train(tmp_path, recipe(max_steps=4))
    assert with_eval.controller.beta == without.controller.beta != 0.1
    used = [entry["kl/beta"] for entry in tiny.logs(without)]
    after = dict(enumerate([*used, without.controller.beta]))
    assert betas == after  # step 0: before training


@pytest.mark.parametrize("adapter", [{}, NF4], ids=["full", "qlora"])
def test_evaluation_without_a_reference_says_so_and_gives_zeros(
    recipe, parts, tmp_path, caplog, adapter
):
    """What `axolotl evaluate` does without `lora_model_dir`."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.evaluate import evaluate

    # in evaluation bitsandbytes packs 4-bit weights for some processors, in blocks
    sizes = dict(hidden_size=64, head_dim=32, intermediate_size=128)
    model = tiny.save_model(tmp_path / "wide", **sizes)
    keys = recipe(base_model=str(model), **{"bf16": True, **adapter})
    keys["test_datasets"] = tiny.dataset(parts["eval"])
    cfg = load_cfg(str(tiny.write(tmp_path, keys)))
    meta = load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    metrics = evaluate(cfg=cfg, dataset_meta=meta)
    assert "compared with itself" in caplog.text
    assert metrics["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["eval_kl/policy_ref"] == metrics["eval_rewards/margins"] == 0.0


def test_a_partial_last_window_counts_the_pairs_that_were_there(recipe, tmp_path):
    """40 pairs in micro-batches of 3, windows of 4: 12, 12, 12, then 3 + 1."""
    keys = dict(micro_batch_size=3, gradient_accumulation_steps=4)
    cut = tiny.train(tmp_path, recipe(**keys, learning_rate=0.0))
    assert [entry["loss"] for entry in tiny.logs(cut)] == pytest.approx([0.693147] * 4)
    trainer = tiny.train(tmp_path, recipe(**keys))
    last = tiny.logs(trainer)[-1]
    up, down = last["kl/p_epsilon_steps"] * 4, last["kl/n_epsilon_steps"] * 4
    assert (up % 1, down % 1) == (0, 0)  # shares of four pairs
    beta = last["kl/beta"]
    expected = beta * (up / 1.05 + down / 0.95 + 4 - up - down) / 4
    assert trainer.controller.beta == pytest.approx(expected, rel=1e-12)


def test_pairs_of_an_uneven_step_weigh_the_same(recipe, tmp_path):
    """The last window as 3 + 1 and as 2 + 2 pairs leaves the same weights."""
    for folder, size in (("a", 3), ("b", 2)):
        keys = dict(
            micro_batch_size=size,
            gradient_accumulation_steps=12 // size,
            output_dir=str(tmp_path / folder),
            adam_epsilon=1e-4,
        )
        tiny.train(tmp_path, recipe(**keys))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def test_a_skipped_optimizer_step_does_not_move_beta(recipe, tmp_path, monkeypatch):
    """What a gradient overflow does under fp16: accelerate reports the skip."""
    from accelerate import Accelerator

    seen = []
    monkeypatch.setattr(
        Accelerator, "optimizer_step_was_skipped", property(lambda self: True)
    )
    monkeypatch.setattr(
        EpsilonController,
        "observe",
        lambda self, steps, observe=EpsilonController.observe: (
            seen.append(steps.abs().sum().item()) or observe(self, steps)
        ),
    )
    trainer = tiny.train(tmp_path, recipe())
    assert sum(seen) > 0
    assert trainer.controller.beta == 0.1


def test_label_smoothing_reaches_the_loss(recipe, tmp_path):
    plain = tiny.train(tmp_path, recipe(max_steps=2))
    smoothed = tiny.train(tmp_path, recipe(max_steps=2, dpo_label_smoothing=0.2))
    a, b = tiny.logs(plain)[1], tiny.logs(smoothed)[1]
    assert a["loss"] != b["loss"]
    assert smoothed.label_smoothing == 0.2


def test_sft_is_a_mean_over_the_steps_tokens_however_it_is_cut(recipe, tmp_path):
    keys = dict(dpo_loss_type=["sigmoid", "sft"], dpo_loss_weights=[1.0, 0.5])
    keys |= dict(max_steps=3, adam_epsilon=1e-4)
    cuts = [
        dict(micro_batch_size=8, gradient_accumulation_steps=1),
        dict(micro_batch_size=2, gradient_accumulation_steps=4),
        dict(micro_batch_size=2, gradient_accumulation_steps=4, sample_packing=True),
    ]
    whole, *parts = [
        tiny.logs(tiny.train(tmp_path, recipe(**keys, **cut))) for cut in cuts
    ]
    assert whole[0]["loss"] > 0.693147 + 0.5  # nats per token of a random model
    for part in parts:
        for a, b in zip(whole, part, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_reference_that_follows_the_policy_is_in_the_checkpoints(recipe, tmp_path):
    """TR-DPO: every three steps it becomes 0.6 policy + 0.4 of what it was."""
    trl = dict(sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=3)
    keys = dict(trl=trl, max_steps=5, save_strategy="steps", save_steps=1)
    whole = tiny.train(tmp_path, recipe(**keys))
    step = {n: tmp_path / "out" / f"checkpoint-{n}" for n in range(2, 6)}
    moved = {n: load_file(step[n] / "reference.safetensors") for n in step}
    policy, start = weights(step[3]), moved[2]
    for name in start:
        torch.testing.assert_close(
            moved[3][name], 0.6 * policy[name] + 0.4 * start[name]
        )
        assert moved[4][name].equal(moved[3][name])
    fourth, fifth = tiny.logs(whole)[3:]
    assert fourth["kl/policy_ref"] < tiny.logs(whole)[2]["kl/policy_ref"]
    resumed = recipe(**keys, resume_from_checkpoint=str(step[4]))
    (again,) = tiny.logs(tiny.train(tmp_path, resumed))[4:]
    assert again["kl/policy_ref"] == fifth["kl/policy_ref"]
    assert again["kl/beta"] == fifth["kl/beta"]


def test_padding_to_a_multiple_changes_the_batch_and_nothing_else(recipe, tmp_path):
    plain = tiny.train(tmp_path, recipe(max_steps=2))
    padded = tiny.train(tmp_path, recipe(max_steps=2, pad_to_multiple_of=64))
    batch = padded.batcher.collators["train"]([padded.train_dataset[0]])
    assert batch["input_ids"].shape[1] % 64 == 0
    for a, b in zip(tiny.logs(plain), tiny.logs(padded), strict=True):
        assert a["logps/chosen"] == pytest.approx(b["logps/chosen"], abs=1e-3)
        assert a["kl/avg_steps"] == b["kl/avg_steps"]


@pytest.mark.parametrize("adapter", first([LORA, {}]), ids=["lora", "full"])
def test_ten_steps_and_a_resume_equal_twenty(recipe, tmp_path, adapter):
    keys = dict(num_epochs=4, save_steps=10, save_strategy="steps", **adapter)
    straight, out = tmp_path / "straight", tmp_path / "out"
    whole = tiny.train(tmp_path, recipe(**keys, output_dir=str(straight)))
    half = recipe(**keys, max_steps=10)
    tiny.train(tmp_path, half)
    resumed = tiny.train(
        tmp_path, recipe(**keys, resume_from_checkpoint=str(out / "checkpoint-10"))
    )
    assert whole.state.global_step == resumed.state.global_step == 20
    assert resumed.controller.beta == whole.controller.beta != 0.1
    betas = [entry["kl/beta"] for entry in tiny.logs(whole)]
    assert [entry["kl/beta"] for entry in tiny.logs(resumed)] == betas
    assert_same_weights(straight / "checkpoint-20", out / "checkpoint-20")


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
def test_a_killed_run_continues_as_if_it_had_not_stopped(recipe, tmp_path, adapter):
    """SIGKILL after step 12 of 20, two steps past a checkpoint, then auto-resume."""
    keys = dict(num_epochs=4, save_steps=5, save_strategy="steps", **adapter)
    straight, out = tmp_path / "straight", tmp_path / "out"
    whole = tiny.train(tmp_path, recipe(**keys, output_dir=str(straight)))
    keys = recipe(**keys, auto_resume_from_checkpoints=True)
    train_until_killed(tmp_path, keys, step=12)
    assert (out / "checkpoint-10").is_dir() and not (out / "checkpoint-15").exists()
    # and a save that was cut short must not be taken for a checkpoint
    (out / "checkpoint-12").mkdir()
    (out / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    resumed = tiny.train(tmp_path, keys)
    assert resumed.controller.beta == whole.controller.beta
    assert_same_weights(straight / "checkpoint-20", out / "checkpoint-20")


def test_a_checkpoint_of_plain_dpo_resumes_with_a_warning(recipe, tmp_path, caplog):
    keys = dict(num_epochs=2, save_steps=5, save_strategy="steps")
    tiny.train(tmp_path, recipe(**keys, **tiny.DPO, max_steps=5))
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    trainer = tiny.train(tmp_path, recipe(**keys, resume_from_checkpoint=checkpoint))
    assert "holds no ε-DPO state" in caplog.text
    assert "`beta: 0.1`" in caplog.text
    assert tiny.logs(trainer)[-1]["kl/beta"] != 0.1


def test_other_settings_resume_with_a_warning_that_says_what_is_used(
    recipe, tmp_path, caplog
):
    keys = dict(num_epochs=2, save_steps=5, save_strategy="steps")
    first = tiny.train(tmp_path, recipe(**keys, max_steps=5))
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    trainer = tiny.train(
        tmp_path,
        recipe(
            **keys, edpo_epsilon=0.2, resume_from_checkpoint=checkpoint, max_steps=6
        ),
    )
    assert "epsilon was 0.05 in the checkpoint and is 0.2 now" in caplog.text
    assert tiny.logs(trainer)[-1]["kl/beta"] == first.controller.beta
    assert trainer.controller.settings.epsilon == 0.2


def test_resuming_an_interrupted_save_is_refused(recipe, tmp_path):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-3.*interrupted"):
        tiny.train(tmp_path, recipe(resume_from_checkpoint=checkpoint))


def test_an_adapter_trained_further_is_its_own_reference(recipe, tmp_path):
    first = tmp_path / "first"
    trained = tiny.train(tmp_path, recipe(**LORA, output_dir=str(first)))
    further = recipe(
        **LORA, lora_model_dir=str(first), save_steps=2, save_strategy="steps"
    )
    trainer = tiny.train(tmp_path, {**further, "max_steps": 4})
    entry = tiny.logs(trainer)[0]
    # starts where the first run ended, and that is the reference
    assert entry["logps/chosen"] != tiny.logs(trained)[0]["logps/chosen"]
    assert entry["kl/policy_ref"] == 0.0
    assert entry["kl/p_epsilon_steps"] == entry["kl/n_epsilon_steps"] == 0.0
    start = weights(first)
    for name, parameter in trainer.model.named_parameters():
        if ".ref." in name:
            saved = start[name.replace(".ref", "")]
            torch.testing.assert_close(parameter.data, saved, rtol=0, atol=0)
    # the copy is not saved, and the checkpoint resumes the adapter, not the copy
    assert not (tmp_path / "out" / "checkpoint-2" / "ref").exists()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    whole = weights(tmp_path / "out" / "checkpoint-4")
    tiny.train(
        tmp_path, {**further, "max_steps": 4, "resume_from_checkpoint": checkpoint}
    )
    for name, value in weights(tmp_path / "out" / "checkpoint-4").items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-6)


def test_a_trained_head_under_lora_is_scored(recipe, tmp_path):
    keys = {**LORA, "lora_modules_to_save": ["lm_head"]}
    trainer = tiny.train(tmp_path, recipe(**keys, max_steps=3))
    first, *_, last = tiny.logs(trainer)
    assert first["kl/policy_ref"] == 0.0 < last["kl/policy_ref"]
    name = "base_model.model.lm_head.weight"
    before = load_file(Path(trainer.model.config._name_or_path) / "model.safetensors")
    saved = weights(tmp_path / "out")[name]
    assert not torch.equal(saved, before["lm_head.weight"])


def test_lora_on_the_head_is_trained(recipe, tmp_path):
    keys = {**LORA, "lora_target_linear": None, "lora_dropout": 0.0, "max_steps": 4}
    keys["lora_target_modules"] = ["q_proj", "lm_head"]
    trainer = tiny.train(tmp_path, recipe(**keys))
    saved = weights(tmp_path / "out")
    (up,) = (value for name, value in saved.items() if "lm_head.lora_B" in name)
    assert up.abs().max() > 0
    first, *_, last = tiny.logs(trainer)
    assert first["kl/policy_ref"] == 0.0 < last["kl/policy_ref"]


def test_a_head_that_cannot_be_read_trains_the_same_with_one_warning(
    recipe, parts, tmp_path, caplog
):
    """The config names a transform that is not known: the model makes its logits."""
    model = tiny.save_model(tmp_path / "model", output_logit_soft_cap=30.0)
    keys = dict(max_steps=4, test_datasets=tiny.dataset(parts["eval"]), eval_steps=2)
    read = tiny.train(tmp_path, recipe(**keys))
    assert "cannot be read" not in caplog.text
    made = tiny.train(tmp_path, recipe(**keys, base_model=str(model)))
    (warning,) = (r for r in caplog.records if "cannot be read" in r.getMessage())
    assert "`output_logit_soft_cap`" in warning.getMessage()
    assert "GiB more memory per 1,000 tokens" in warning.getMessage()
    for a, b in zip(made.state.log_history, read.state.log_history, strict=True):
        for name in a.keys() - {"grad_norm"}:
            if not name.endswith(("runtime", "second", "flos")):
                assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-6), name
    assert made.controller.beta == pytest.approx(read.controller.beta, abs=1e-12)


def test_micro_batches_do_not_collect_garbage(recipe, tmp_path, monkeypatch):
    """axolotl up to 0.20 collects it, and flushes the GPU's cache, after each one."""
    calls = []
    real = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *args: calls.append(1) or real(*args))

    def count(steps, **keys):
        calls.clear()
        tiny.train(tmp_path, recipe(**keys, max_steps=steps))
        return len(calls)

    assert count(4) == count(2)
    flushes = "training_step" in vars(AxolotlDPOTrainer)
    assert count(4, **tiny.DPO) == count(2, **tiny.DPO) + 2 * 2 * flushes


def test_a_gradient_that_overflows_is_left_to_the_scaler_of_fp16(recipe, tmp_path):
    trainer = tiny.train(tmp_path, recipe(max_steps=1))
    overflow = torch.tensor(math.inf)
    with pytest.raises(Diverged, match="the gradient is not finite in step 2"):
        trainer._get_grad_norm(trainer.model, grad_norm=overflow)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer._get_grad_norm(trainer.model, grad_norm=overflow) == overflow
