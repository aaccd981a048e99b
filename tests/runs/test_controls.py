"""What moves β, in whole runs: `edpo_control`, and TR-DPO beside any of them."""

import json
import math
import shutil
import statistics

import pandas
import pytest
import torch
from helpers import tiny
from helpers.controls import FILTERED, FIXED, HALF_TAILS, MARGIN
from helpers.tiers import first
from helpers.tiny import CACHED, DPO, LORA
from helpers.weights import weights
from safetensors.torch import load_file, save_file
from trl.trainer.callbacks import SyncRefModelCallback

from axolotl_edpo.data.pair_id import pair_digest
from axolotl_edpo.plugin import PLUGIN
from axolotl_edpo.training.first_step import WrongStart
from axolotl_edpo.training.margin_filter import MarginFilter, gumbel

CUTS = {
    "whole": dict(micro_batch_size=8, gradient_accumulation_steps=1),
    "cut": dict(micro_batch_size=2, gradient_accumulation_steps=4),
    "dealt": dict(
        micro_batch_size=4, gradient_accumulation_steps=2, sample_packing=True
    ),
    "cached": dict(micro_batch_size=4, gradient_accumulation_steps=2, **CACHED),
}
SOFT = dict(sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=3)
HARD = dict(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=7)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in tiny.logs(trainer, "loss") if name in entry]


@pytest.fixture
def train(recipe, tmp_path):
    """Trains a recipe in a folder of its own."""
    count = iter(range(100))

    def run(**keys):
        out = str(tmp_path / f"out{next(count)}")
        return tiny.train(tmp_path, recipe(output_dir=out, **keys))

    return run


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_overflow_in_step_1_is_named_by_beta_dpo_too(
    parts, tmp_path, train, micro_batches
):
    """The weights are finite. Their products are not, so no margin is."""
    model = shutil.copytree(parts["model"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= 1e20
    tensors["model.norm.weight"] *= 1e25
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    keys = dict(base_model=str(model), gradient_accumulation_steps=micro_batches)
    with pytest.raises(WrongStart, match="are not finite on rank 0.* overflows"):
        train(**keys, **FILTERED)


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
def test_fixed_is_plain_dpo_for_twenty_steps(recipe, tmp_path, adapter):
    """Both begin with the same weights: axolotl draws an adapter without a seed."""
    keys = dict(num_epochs=4, adam_epsilon=1e-4, **adapter)
    plain = tiny.build(tmp_path, recipe(**keys, **DPO))
    start = {name: w.clone() for name, w in plain.model.state_dict().items()}
    plain.train()
    losses = logged(plain, "loss")
    assert len(losses) == 20 and min(losses) < 0.6 < max(losses)
    for rows in ({}, {"sample_packing": True}):
        ours = tiny.build(tmp_path, recipe(**keys, **rows, **FIXED))
        ours.model.load_state_dict(start, strict=False)
        ours.train()
        assert logged(ours, "loss") == pytest.approx(losses, abs=1e-5)
        assert logged(ours, "kl/beta") == [0.1] * 20


def test_tails_that_count_half_are_those_of_trl(train):
    """axolotl's own trainer of `rl: dpo` against this one, twenty steps."""
    keys = dict(num_epochs=4, adam_epsilon=1e-4)
    plain = train(**keys, **{**DPO, "plugins": HALF_TAILS[1:]})
    losses = logged(plain, "loss")
    for rows in ({}, {"sample_packing": True}):
        ours = train(**keys, **rows, **FIXED, plugins=HALF_TAILS)
        assert logged(ours, "loss") == pytest.approx(losses, abs=1e-5)
    whole = logged(train(**keys, **FIXED), "loss")
    assert max(abs(a - b) for a, b in zip(losses, whole, strict=True)) > 1e-3


@pytest.mark.parametrize("trl", [SOFT, HARD], ids=["soft", "hard"])
def test_a_moving_reference_is_what_trls_callback_makes_of_it(
    recipe, tmp_path, train, trl
):
    """axolotl's own trainer of `rl: dpo`, with TRL's callback added by hand."""
    keys = dict(num_epochs=4, adam_epsilon=1e-4, dataset_num_proc=0)
    plain = tiny.build(tmp_path, recipe(**keys, **DPO))
    plain.args.ref_model_mixup_alpha = trl["ref_model_mixup_alpha"]
    plain.args.ref_model_sync_steps = trl["ref_model_sync_steps"]
    callback = SyncRefModelCallback(plain.ref_model, plain.accelerator)
    plain.add_callback(callback)
    plain.train()
    ours = train(**keys, **FIXED, trl=trl)
    theirs = logged(plain, "loss")
    assert logged(ours, "loss") == pytest.approx(theirs, abs=1e-5)
    still = logged(train(**keys, **FIXED), "loss")
    assert max(abs(a - b) for a, b in zip(theirs, still, strict=True)) > 1e-2


@pytest.mark.parametrize("control", [{}, FIXED, MARGIN], ids=["epsilon", "fixed", "m"])
def test_the_reference_moves_with_any_control_as_worked_by_hand(
    train, tmp_path, control
):
    """θ_ref ← α θ + (1-α) θ_ref every second step, from the saved policies."""
    trl = dict(sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=2)
    keys = dict(max_steps=5, save_strategy="steps", save_steps=1)
    keys |= dict(save_total_limit=9)
    train(**keys, **control, trl=trl)
    step = {n: tmp_path / "out0" / f"checkpoint-{n}" for n in range(1, 6)}
    moved = {n: load_file(step[n] / "reference.safetensors") for n in step}
    for name, start in moved[1].items():
        second = 0.25 * weights(step[2])[name] + 0.75 * start
        fourth = 0.25 * weights(step[4])[name] + 0.75 * second
        for n, expected in ((2, second), (3, second), (4, fourth), (5, fourth)):
            torch.testing.assert_close(moved[n][name], expected)


def test_a_hard_update_leaves_no_difference_at_the_step_after_it(train):
    trainer = train(trl=HARD, num_epochs=2)
    kl, steps = logged(trainer, "kl/policy_ref"), logged(trainer, "kl/p_epsilon_steps")
    assert (kl[0], kl[7], steps[7]) == (0.0, 0.0, 0.0)
    assert all(value > 0 for step, value in enumerate(kl) if step not in (0, 7))


def trace_of(trainer) -> pandas.DataFrame:
    return pandas.read_parquet(f"{trainer.args.output_dir}/edpo_pairs")


@pytest.mark.parametrize("cut", ["whole", "cut"])
@pytest.mark.parametrize("plugins", [[PLUGIN], HALF_TAILS], ids=["all", "half tails"])
def test_beta_of_each_batch_is_what_its_margins_make_by_hand(train, cut, plugins):
    """Margins as the trace has them: β(w - l), so divided by the β of the step."""
    keys = dict(num_epochs=2, edpo_log_pairs=1, plugins=plugins, **CUTS[cut])
    trainer = train(**MARGIN, **keys)
    trace, average = trace_of(trainer), 0.0
    betas, averages = [], []
    for _, step in trace.groupby("global_step"):
        mean = statistics.fmean(step["margin"] / step["beta"])
        average = 0.9 * average + 0.1 * mean
        betas.append(max(0.1 * (1 + 0.6 * (mean - average)), 1e-3))
        averages.append(average)
    assert logged(trainer, "kl/beta") == pytest.approx(betas, rel=1e-4)
    assert logged(trainer, "kl/margin_average") == pytest.approx(averages, rel=1e-4)
    assert betas[0] == 0.1 and max(betas) > 0.11 and min(betas[1:]) < 0.1


def test_the_filter_leaves_out_the_pairs_that_it_draws_and_no_others(train):
    """By hand, from the margins of the trace; the loss is the mean over the rest."""
    keys = dict(max_steps=4, edpo_log_pairs=1, **CUTS["whole"])
    trainer = train(**FILTERED, **keys)
    by_id = {pair_digest(row).hex(): row for row in trainer.train_dataset}
    average = deviation = 0.0
    for number, step in trace_of(trainer).groupby("global_step"):
        margins = dict(zip(step["id"], step["margin"] / step["beta"], strict=True))
        average = 0.9 * average + 0.1 * statistics.fmean(margins.values())
        deviation = 0.9 * deviation + 0.1 * statistics.stdev(margins.values())
        key = {
            name: gumbel(f"7 {number - 1}", by_id[name])
            - (((m - average) / deviation) ** 2 / 2 if deviation else 0)
            for name, m in margins.items()
        }
        kept = sorted(key, key=key.get)[-6:]
        beta = 0.1 * (1 + 0.6 * (statistics.fmean(margins[n] for n in kept) - average))
        entry = tiny.logs(trainer)[number - 1]
        assert entry["kl/beta"] == pytest.approx(beta, rel=1e-3)
        loss = statistics.fmean(math.log1p(math.exp(-beta * margins[n])) for n in kept)
        assert entry["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("adapter", first([{}, LORA]), ids=["full", "lora"])
@pytest.mark.parametrize("cut", [name for name in CUTS if name != "whole"])
def test_no_cut_of_a_step_changes_what_batch_margin_does(train, cut, adapter):
    keys = dict(**FILTERED, num_epochs=2, adam_epsilon=1e-4, **adapter)
    whole, other = train(**keys, **CUTS["whole"]), train(**keys, **CUTS[cut])
    for name in ("kl/beta", "kl/margin_average", "loss"):
        own = logged(other, name)
        assert own == pytest.approx(logged(whole, name), abs=2e-5), name


def test_gradient_checkpointing_changes_nothing_of_batch_margin(train):
    """Margins are computed before the step, with checkpointing switched off."""
    keys = dict(**FILTERED, max_steps=4, **CUTS["cut"])
    plain, checkpointed = train(**keys), train(**keys, gradient_checkpointing=True)
    assert logged(checkpointed, "loss") == pytest.approx(logged(plain, "loss"))


def test_evaluation_takes_the_beta_of_the_recipe_and_leaves_no_pair_out(train, parts):
    """Else its loss would depend on the batch before it. Training does not notice."""
    keys = dict(**FILTERED, num_epochs=2, adam_epsilon=1e-4)
    data = tiny.dataset(parts["pairs"])
    evaluated = train(**keys, test_datasets=data, eval_steps=1)
    betas = [e["eval_kl/beta"] for e in tiny.logs(evaluated, "eval_kl/beta")]
    assert len(betas) > 9 and {*betas} == {0.1}
    plain = train(**keys)
    for name in ("kl/beta", "kl/margin_average", "loss"):
        assert logged(evaluated, name) == logged(plain, name)
    # the last evaluation by hand: the DPO loss at 0.1 of all pairs
    fixed = train(**FIXED, test_datasets=data, max_steps=1, learning_rate=0.0)
    fixed.model.load_state_dict(evaluated.model.state_dict())
    last = tiny.logs(evaluated, "eval_loss")[-1]["eval_loss"]
    assert fixed.evaluate()["eval_loss"] == pytest.approx(last, abs=1e-6)


def test_after_a_hard_update_margins_and_their_average_are_0_alike(train):
    trainer = train(**MARGIN, trl=HARD, num_epochs=4)
    betas, averages = logged(trainer, "kl/beta"), logged(trainer, "kl/margin_average")
    assert [betas[step] for step in (0, 7, 14)] == [0.1] * 3
    assert [averages[step] for step in (0, 7, 14)] == [0.0] * 3
    assert averages[6] > 0.1


def test_the_look_at_a_step_leaves_no_masks_behind(train, monkeypatch):
    left, begin = [], MarginFilter._begin

    def watched(self, batches, margins, step):
        left.append(sum(len(batch["segments"].cache.entries) for batch in batches))
        begin(self, batches, margins, step)

    monkeypatch.setattr(MarginFilter, "_begin", watched)
    train(**MARGIN, max_steps=3, **CUTS["dealt"])
    assert left == [0, 0, 0]


@pytest.mark.parametrize("control", [FIXED, FILTERED], ids=["fixed", "batch_margin"])
def test_half_a_run_and_a_resume_are_the_run(train, tmp_path, control):
    keys = dict(**control, num_epochs=2, save_strategy="steps", save_steps=5)
    whole = train(**keys)
    start = tmp_path / "out0" / "checkpoint-5"
    resumed = train(**keys, resume_from_checkpoint=str(start))
    for name in ("kl/beta", "loss"):
        assert logged(resumed, name) == logged(whole, name)
    state = json.loads((start / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EDPO"]["control"] == control["edpo_control"]


def test_steps_are_logged_only_where_they_are_made(train):
    epsilon, fixed = train(max_steps=2), train(max_steps=2, **FIXED)
    of_steps = {"kl/avg_steps", "kl/p_epsilon_steps", "kl/n_epsilon_steps"}
    names = [
        {name for entry in tiny.logs(t) for name in entry} for t in (epsilon, fixed)
    ]
    assert names[0] - names[1] == of_steps
    assert logged(fixed, "kl/policy_ref")[1] > 0


def test_another_control_goes_on_from_a_checkpoint_with_a_warning(
    train, tmp_path, caplog
):
    keys = dict(num_epochs=2, save_strategy="steps", save_steps=5)
    train(**keys)
    start = str(tmp_path / "out0" / "checkpoint-5")
    fixed = train(**keys, **FIXED, resume_from_checkpoint=start)
    assert logged(fixed, "kl/beta")[5:] == [0.1] * 5
    told = "control was epsilon in the checkpoint and is fixed now. Continuing from β"
    assert told in caplog.text
