"""health.py: which logs name what, worked by hand."""

import pytest

from axolotl_edpo.report.logged import SHOWN_BY
from axolotl_edpo.run_files import WARNINGS
from axolotl_edpo.training import health
from axolotl_edpo.training.health import HealthCheck

HEALTHY = {
    "loss": 0.5,
    "rewards/accuracies": 0.75,
    "rewards/chosen": -0.25,
    "rewards/rejected": -1.0,
    "rewards/margins": 0.75,
    "kl/policy_ref": 0.3,
}
# What is just beyond the bounds, and each value that is enough to be within them.
CASES = {
    "overfitting": (
        {"loss": 0.019, "rewards/accuracies": 0.991},
        [{"loss": 0.02}, {"rewards/accuracies": 0.99}],
    ),
    "exploding margins": (
        {"rewards/margins": -20.5},
        [{"rewards/margins": -20.0}, {"rewards/margins": 20.0}],
    ),
    "collapse": (
        {"kl/policy_ref": 4.1},
        [{"kl/policy_ref": 4.0}, {"rewards/chosen": 0.0}, {"rewards/rejected": 0.0}],
    ),
}


def logs(*changes: dict) -> list[dict]:
    """A log of training per optimizer step, healthy but for the changes."""
    return [
        {**HEALTHY, "step": step, "epoch": step / 10, **change}
        for step, change in enumerate(changes, 1)
    ]


def named(check: HealthCheck, history: list[dict]) -> dict[int, list[str]]:
    """What the check names at each step as the history grows."""
    found = {
        history[end]["step"]: [*check.find(history[: end + 1])]
        for end in range(len(history))
    }
    return {step: names for step, names in found.items() if names}


@pytest.mark.parametrize("name", CASES)
def test_without_a_reference_rewards_are_no_distances(name):
    bad, _ = CASES[name]
    found = named(HealthCheck(has_reference=False), logs(*[bad] * 5))
    assert found == ({5: [name]} if name == "overfitting" else {})


@pytest.mark.parametrize("name", CASES)
def test_a_condition_is_named_once_after_five_logs_in_a_row(name):
    bad, _ = CASES[name]
    four, five = [bad] * 4, [bad] * 5
    assert named(HealthCheck(), logs({}, *four, {}, *four)) == {}
    assert named(HealthCheck(), logs({}, *four, {}, *five, {}, *five)) == {11: [name]}


@pytest.mark.parametrize(
    ("name", "within"), [(name, w) for name, (_, ws) in CASES.items() for w in ws]
)
def test_a_value_at_its_bound_is_healthy(name, within):
    bad, _ = CASES[name]
    assert named(HealthCheck(), logs(*[{**bad, **within}] * 5)) == {}


def test_positive_margins_explode_as_negative_ones_do():
    mixed = [{"rewards/margins": sign * 21.0} for sign in (1, -1, 1, -1, 1)]
    assert named(HealthCheck(), logs(*mixed)) == {5: ["exploding margins"]}


def test_the_line_says_step_name_and_what_to_do():
    for name, (bad, _) in CASES.items():
        line = HealthCheck().find(logs(*[bad] * 5))[name]
        assert line.startswith(f"Step 5, {name}: in each of the last 5 logs ")
        assert "`learning_rate`" in line and line.endswith(".")


def test_evaluations_between_logs_neither_count_nor_interrupt():
    bad, _ = CASES["collapse"]
    history = logs(*[bad] * 5)
    evaluation = {f"eval_{key}": value for key, value in HEALTHY.items()}
    history.insert(3, {**evaluation, "step": 3})
    history.append({"train_runtime": 1.0, "train_loss": 0.5, "step": 6})
    assert named(HealthCheck(0.1), history[-1:]) == {}
    assert named(HealthCheck(), history) == {5: ["collapse"]}


def test_a_resumed_run_counts_on_and_repeats_nothing():
    bad, _ = CASES["collapse"]
    history = logs(*[bad] * 7)
    history[4][WARNINGS] = {"collapse": "Step 5, ..."}
    resumed = HealthCheck()
    resumed.begin(history[:5])
    assert named(resumed, history) == {}
    before_it_was_named = HealthCheck()
    before_it_was_named.begin(history[:3])
    assert [*before_it_was_named.find(history[:5])] == ["collapse"]


def test_the_bound_of_the_user_holds_for_a_single_log_and_each_time():
    check = HealthCheck(max_kl=0.5)
    at, above = {"kl/policy_ref": 0.5}, {"kl/policy_ref": 0.625, "rewards/chosen": 1.0}
    history = logs(at, above, above)
    assert named(check, history) == {2: ["edpo_max_kl"], 3: ["edpo_max_kl"]}
    assert [check.stops(log) for log in history] == [False, True, True]
    line = check.find(history)["edpo_max_kl"]
    assert "is 0.625 nats per token, above `edpo_max_kl: 0.5`: training stops" in line
    assert not HealthCheck().stops(history[1])


def test_the_report_knows_which_curves_show_each_condition():
    names = {condition.name for condition in health.CONDITIONS}
    assert {*SHOWN_BY} == {*CASES, health.MAX_KL} == {*names, health.MAX_KL}
