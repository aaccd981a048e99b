"""Runs that are driven into collapse get their line, healthy runs get none."""

import json
from pathlib import Path

import pytest
from helpers import tiny
from helpers.report_pages import numbers, page_of
from helpers.tiers import rest
from safetensors.torch import load_file

from axolotl_edpo.report import figures, logged, runs
from axolotl_edpo.run_files import WARNINGS

# 500 times the learning rate of `tiny.recipe`.
DRIVEN = {"learning_rate": 0.5, "save_strategy": "steps", "save_steps": 100}
FIXED = {"edpo_control": "fixed", "edpo_epsilon": None}
HEALTHY = [
    {},
    {"edpo_epsilon": 0.2},
    FIXED,
    {"edpo_control": "batch_margin", "edpo_epsilon": None},
    tiny.LORA,
]


@pytest.fixture(scope="module")
def driven(parts, tmp_path_factory):
    """The trainer of a collapsing run of nine steps, and what it said."""
    folder = tmp_path_factory.mktemp("driven")
    keys = {**DRIVEN, "max_steps": 9, "save_steps": 8}
    keys["dataset_prepared_path"] = str(parts["prepared"])
    keys = tiny.recipe(folder, parts["model"], parts["pairs"], **keys)
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("axolotl_edpo.training.callbacks.LOG.warning", said.append)
        trainer = tiny.train(folder, keys)
    return trainer, said, keys


def collapsed_at(history: list[dict]) -> int:
    """The step at which both rewards were below 0 and KL above 4 for the fifth log."""
    in_a_row = 0
    for log in history:
        fell = max(log["rewards/chosen"], log["rewards/rejected"]) < 0
        in_a_row = in_a_row + 1 if fell and log["kl/policy_ref"] > 4 else 0
        if in_a_row == 5:
            return log["step"]
    raise AssertionError("the run did not collapse")


def warnings(trainer) -> dict[int, list[str]]:
    """The names of what was found, by step."""
    history = trainer.state.log_history
    return {log["step"]: [*log[WARNINGS]] for log in history if WARNINGS in log}


def test_a_run_driven_into_collapse_gets_one_line_at_its_step(driven):
    trainer, said, _ = driven
    step = collapsed_at(tiny.logs(trainer))
    assert 5 < step <= 8 and warnings(trainer) == {step: ["collapse"]}
    (line,) = said
    assert line.startswith(f"Step {step}, collapse: ") and "`learning_rate`" in line
    assert trainer.state.global_step == 9  # it is named, not stopped


@rest
def test_a_resumed_run_does_not_say_it_again(driven, tmp_path, caplog):
    trainer, _, keys = driven
    step = collapsed_at(tiny.logs(trainer))
    checkpoint = Path(keys["output_dir"]) / "checkpoint-8"
    keys = {**keys, "output_dir": str(tmp_path / "out"), "max_steps": 9}
    resumed = tiny.train(tmp_path, {**keys, "resume_from_checkpoint": str(checkpoint)})
    assert resumed.state.global_step == 9 and "collapse" not in caplog.text
    assert warnings(resumed) == {step: ["collapse"]}


def test_the_report_says_the_line_and_marks_its_step(driven, tmp_path):
    trainer, (line,), keys = driven
    step, out = collapsed_at(tiny.logs(trainer)), Path(keys["output_dir"])
    page = page_of(tmp_path, out)
    above = page.text("header")
    assert line in above and f"collapse: step {step}" in page.text("svg")
    (result,) = numbers(tmp_path, out)
    assert result["warnings"] == [{"step": step, "name": "collapse", "line": line}]
    run = runs.read_run(out)
    for metric, marked in (
        (logged.KL, True),
        (logged.MARGIN, True),
        (logged.LOSS, False),
    ):
        for figure in (
            figures.draw_metric(metric, run),
            figures.draw_runs(metric, [run], ["a"]),
        ):
            lines = [[*line.get_xdata()] for line in figure.axes[0].lines]
            assert ([step, step] in lines) is marked, metric.name


def test_beyond_the_bound_of_the_user_a_run_saves_and_stops(recipe, tmp_path, caplog):
    """As it ends, the model is saved as at the end of any run."""
    trainer = tiny.train(tmp_path, recipe(**DRIVEN, max_steps=9, edpo_max_kl=1.0))
    kls = [log["kl/policy_ref"] for log in tiny.logs(trainer)]
    assert max(kls[:-1]) <= 1.0 < kls[-1] and 1 < len(kls) < 9
    steps, out = len(kls), tmp_path / "out"
    assert trainer.state.global_step == steps
    assert warnings(trainer) == {steps: ["edpo_max_kl"]}
    assert caplog.text.count(f"Step {steps}, edpo_max_kl: ") == 1
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    state = json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EDPO"]["beta"] == trainer.controller.beta
    saved = load_file(out / f"checkpoint-{steps}" / "model.safetensors")
    final = load_file(out / "model.safetensors")
    assert all((saved[name] == final[name]).all() for name in final)
    (result,) = numbers(tmp_path, out)
    assert result["status"] == f"stopped itself after {steps} of 9 steps"
    (warned,) = result["warnings"]
    assert (warned["step"], warned["name"]) == (steps, "edpo_max_kl")


@rest
def test_with_a_larger_bound_a_stopped_run_goes_on(recipe, tmp_path):
    keys = {**DRIVEN, "max_steps": 6, "edpo_max_kl": 1.0}
    stopped = tiny.train(tmp_path, recipe(**keys)).state.global_step
    keys["resume_from_checkpoint"] = str(tmp_path / "out" / f"checkpoint-{stopped}")
    again = tiny.train(tmp_path, recipe(**keys))
    assert again.state.global_step == stopped + 1  # once more beyond the same bound
    trainer = tiny.train(tmp_path, recipe(**{**keys, "edpo_max_kl": 50}))
    assert trainer.state.global_step == 6
    assert warnings(trainer) == {stopped: ["edpo_max_kl"]}


@rest
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        # random words, learned by heart in six epochs
        ("overfitting", {**FIXED, "beta": 1.0, "num_epochs": 6}),
        ("exploding margins", {**FIXED, "beta": 10.0, "learning_rate": 0.02}),
    ],
)
def test_the_other_conditions_are_named_too(recipe, tmp_path, name, keys):
    trainer = tiny.train(tmp_path, recipe(**{"num_epochs": 4, **keys}))
    assert [*warnings(trainer).values()] == [[name]]
    (step,) = warnings(trainer)
    recent = [log for log in tiny.logs(trainer) if step - 5 < log["step"] <= step]
    margins = [abs(log["rewards/margins"]) for log in recent]
    losses = [log["loss"] for log in recent]
    assert len(recent) == 5
    assert min(margins) > 20 if name == "exploding margins" else max(losses) < 0.02


@rest
@pytest.mark.parametrize("keys", HEALTHY, ids=str)
def test_a_healthy_run_gets_no_line(recipe, tmp_path, keys, caplog):
    trainer = tiny.train(tmp_path, recipe(**{"num_epochs": 3, **keys}))
    assert len(tiny.logs(trainer)) >= 15 and warnings(trainer) == {}
    assert "in each of the last 5 logs" not in caplog.text
    assert tiny.logs(trainer)[-1]["loss"] < tiny.logs(trainer)[1]["loss"]
