"""examples/study: a cell for real, results that are kept, and numbers by hand."""

import importlib
import itertools
import json
import math
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers.paths import ROOT
from helpers.tiers import rest

STUDY = ROOT / "examples" / "study"
sys.path.insert(0, str(STUDY))
grid = importlib.import_module("grid")
cell = importlib.import_module("cell")
run = importlib.import_module("run")
flips = importlib.import_module("flips")
grade = importlib.import_module("grade")
summary = importlib.import_module("summary")
page = importlib.import_module("page")
regret = importlib.import_module("regret")
sweep = importlib.import_module("sweep")
sweep_page = importlib.import_module("sweep_page")
lm = importlib.import_module("lm")
world = importlib.import_module("world")

TINY = grid.Grid(
    seeds=1,
    betas=(0.1,),
    epsilons=(),
    harmonic=(),
    world=grid.build.Settings(
        layers=1, steps=260, train_pairs=224, eval_pairs=50, held_out_prompts=160
    ),
    epochs=2,
    answers=4,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A study's folder with a world in it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    cell.build_world(folder, TINY.world)
    return folder


@pytest.fixture(scope="module")
def edpo():
    """ε-DPO, with a trace and saved policies."""
    return next(c for c in TINY.cells() if c.method == "ε-DPO")


@pytest.fixture
def short(edpo):
    """Six steps of it, without policies on the way."""
    keys = {k: v for k, v in edpo.keys.items() if k not in grid.POLICIES}
    return replace(edpo, keys={**keys, "max_steps": 6}, answers=1)


@pytest.fixture(scope="module")
def reference(work):
    """The result of the cell that trains nothing."""
    return json.loads(cell.run(work, TINY.cells()[0]).read_text())


@pytest.fixture(scope="module")
def result(work, edpo):
    """The result of ε-DPO."""
    return json.loads(cell.run(work, edpo).read_text())


@rest
def test_the_reference_is_no_distance_from_itself(reference):
    assert reference["kl"] == reference["kl_per_token"] == 0
    assert reference["accuracy"] == 0.5
    assert reference["answers"] == 50 * TINY.answers


@rest
def test_a_cell_learns_what_the_world_rewards(result, reference):
    assert result["reward"] > reference["reward"] + 2 * reference["reward_error"]
    assert result["accuracy"] > 0.55
    assert result["kl"] > 0
    assert result["kl"] == pytest.approx(
        result["kl_per_token"] * result["answer_tokens"]
    )


@rest
def test_beta_stays_within_what_its_steps_allow(result):
    betas = result["series"]["kl/beta"]
    assert len(betas) == result["steps"] == TINY.steps == 28
    assert betas[0] == grid.BETA != betas[-1]
    for before, after in itertools.pairwise(betas):
        assert 1 / (1 + grid.EPSILON) <= after / before * (1 + 1e-9)
        assert after / before <= 1 / (1 - grid.EPSILON) * (1 + 1e-9)


@rest
def test_our_steps_are_exact_where_the_released_formula_is_not(result):
    stages = result["decisions"]
    assert [stage["step"] for stage in stages] == [5, 10, 25, 28]
    for stage in stages:
        assert stage["ours"] >= 0.99
        assert stage["released, bfloat16"] < stage["ours"]


@rest
def test_a_trace_holds_every_visit_and_knows_the_flipped_pairs(work, edpo, result):
    visits = flips.read_trace(cell.trace_folder(cell.result_file(work, edpo)))
    assert len(visits) == TINY.epochs * TINY.world.train_pairs
    once = visits.groupby("id").flipped.first()
    assert len(once) == TINY.world.train_pairs
    assert once.sum() == round(TINY.world.flipped * TINY.world.train_pairs)
    found = flips.told_apart(visits)
    assert sum(found["step"]["clean"]) == pytest.approx(1)
    classes = flips.classes(visits)
    assert sum(classes[s]["share"] for s in ("-1", "0", "1")) == pytest.approx(1)
    assert classes["step"][-1] == TINY.steps
    assert classes["1"]["margin"][-1] > 0 > classes["-1"]["margin"][-1]


@rest
def test_a_killed_study_runs_what_is_missing_and_finds_the_same(
    work, edpo, result, short
):
    kept, missing = (cell.result_file(work, c) for c in (edpo, short))
    # in a worker as well: with other threads its numbers differ in the last digits
    assert run.run([short], work, workers=1) == 1
    first = json.loads(missing.read_text())
    missing.unlink()
    # as a killed run leaves it
    missing.with_suffix(".partial").write_text('{"reward": 9')
    (missing.with_suffix("") / "prepared").mkdir(parents=True)
    (missing.with_suffix("") / "prepared" / "datasets_prep.lock").touch()
    before = kept.stat().st_mtime_ns
    assert run.run([edpo, short], work, workers=1) == 1
    assert kept.stat().st_mtime_ns == before
    second = json.loads(missing.read_text())
    assert first.pop("seconds") != second.pop("seconds")
    assert first == second
    assert not missing.with_suffix("").exists()
    assert run.run([edpo, short], work, workers=1) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"keys": {"beta": 0.2}},
        {"seed": 1},
        {"answers": 3},
        {"world": replace(TINY.world, flipped=0.3)},
    ],
)
def test_a_changed_cell_has_another_result(edpo, tmp_path, changed):
    other = replace(edpo, **changed)
    assert cell.result_file(tmp_path, other) != cell.result_file(tmp_path, edpo)


@rest
def test_a_cell_that_fails_names_its_recipe(work, short):
    wrong = replace(short, keys={**short.keys, "edpo_epsilon": 2})
    file = cell.result_file(work, wrong)
    with pytest.raises(RuntimeError, match=f"ε 2, seed 0: .*{file.stem}.yml"):
        cell.run(work, wrong)
    assert not file.exists()


def test_the_grids_are_what_the_readme_says():
    readme = (STUDY / "README.md").read_text()
    for name, chosen in run.GRIDS.items():
        cells = chosen.cells()
        assert f"| `{name}` | {len(cells)} |" in readme
        assert len({c.digest() for c in cells}) == len(cells)
    for method in [*grid.Grid().methods(), *sweep.METHODS]:
        assert f"| {method} |" in readme


@rest
def test_the_kl_of_an_answer_is_summed_by_hand(work, result):
    folder = cell.world_folder(work, TINY.world)
    model, tokenizer = lm.load(folder / "model")
    other, _ = lm.load(folder / "model")
    other.model.norm.weight.data *= 0.5
    torch.manual_seed(0)
    sampled = lm.sample(model, tokenizer, world.all_prompts()[:3])
    with torch.no_grad():
        found = grade.answer_kl(model, other, sampled)
    for row, kl in enumerate(found):
        answer = sampled.is_answer[row].nonzero()[:, 0]
        first, last = int(answer[0]), int(answer[-1])
        start = int(sampled.attention[row].nonzero()[0, 0])
        ids = sampled.ids[row : row + 1, start : last + 1]
        p, q = (m(input_ids=ids).logits[0].double().softmax(-1) for m in (model, other))
        before = slice(first - start - 1, last - start)
        assert kl.item() == pytest.approx(
            (p * (p / q).log())[before].sum().item(), rel=1e-4
        )


@rest
def test_an_answer_ends_with_its_first_end_token(work, result):
    model, tokenizer = lm.load(cell.world_folder(work, TINY.world) / "model")
    sampled = lm.sample(model, tokenizer, world.all_prompts()[:20])
    for ids, is_answer in zip(sampled.ids, sampled.is_answer, strict=True):
        answer = ids[is_answer].tolist()
        assert tokenizer.eos_token_id not in answer[:-1]
        assert len(answer) <= lm.LONGEST_ANSWER


def test_a_sentence_that_only_looks_like_an_opening_is_malformed():
    prompt = "Tell me the color of the fox."
    assert world.true_reward(prompt, "Whatever! The fox is red.") == world.MALFORMED


def test_the_area_under_the_curve_counts_pairs_that_are_in_order():
    scores = pd.Series([3.0, 1.0, 1.0, 0.0])
    clean = pd.Series([True, True, False, False])
    # 3 > 1, 3 > 0, 1 = 1, 1 > 0
    assert flips.auc(scores, clean) == (1 + 1 + 0.5 + 1) / 4


def test_an_interval_over_seeds_is_students():
    found = summary.Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not found.is_difference
    assert summary.Estimate.of([1.0, 1.1, 1.2]).is_difference


def test_differences_are_taken_seed_by_seed():
    ours = [{"seed": seed, "reward": seed + 0.5} for seed in (0, 1, 2)]
    theirs = [{"seed": seed, "reward": float(seed)} for seed in (2, 1, 0)]
    assert summary.paired(ours, theirs, "reward") == (0.5, 0.0)


def test_a_run_is_compared_with_the_curve_at_its_own_kl():
    curve = {
        beta: [{"seed": 0, "kl": kl, "reward": reward}]
        for beta, kl, reward in ((0.1, 4.0, 2.0), (0.5, 1.0, 1.0), (2.0, 0.1, 0.0))
    }
    # log 2 is half way from log 1 to log 4, where the curve has 1.5
    found = summary.above_curve([{"seed": 0, "kl": 2.0, "reward": 1.75}], curve)
    assert found.mean == pytest.approx(0.25)
    assert summary.above_curve([{"seed": 0, "kl": 5.0, "reward": 9.0}], curve) is None


@pytest.mark.parametrize("name", ["small", "sweep"])
def test_results_in_the_repository_are_what_the_page_says(name):
    whole = summary.load(name)
    places = summary.Places.of(name)
    assert places.json.stat().st_size < 300_000
    assert len(whole["cells"]) == len(run.GRIDS[name].cells())
    written = {"small": page, "sweep": sweep_page}[name].text_of(whole, places)
    assert places.tables.read_text() == written


def test_the_learning_rate_of_the_sweep_is_that_of_the_plans_rule():
    cells = summary.load("sweep")["cells"]
    assert sweep_page.best_rate(cells) == sweep.SWEEP.learning_rate
    best = summary.select(cells, group="trial", learning_rate=4e-4)
    means = {b: sweep_page._mean_reward(summary.select(best, beta=b)) for b in TRIED}
    # the initial β of the sweep: the best one of the trials, times 0.1 to 10
    assert [b / max(means, key=means.get) for b in sweep.BETAS] == [0.1, 0.3, 1, 3, 10]


# --- the second study --------------------------------------------------------------

TRIED = sweep.SWEEP.trial_betas

SMALLEST = sweep.Sweep(
    world=replace(TINY.world, train_pairs=64, eval_pairs=20),
    epochs=1,
    step_pairs=8,
    learning_rate=4e-4,
    seeds=2,
    fewer_seeds=1,
    betas=(0.1, 1.0),
    answers=1,
    recipe=sweep.SWEEP.recipe | {"logging_steps": 1},
)


def _rewards(method: str, beta: float, rewards: list[float]) -> list[dict]:
    return [
        {
            "group": "sweep",
            "method": method,
            "keys": {"beta": beta},
            "seed": seed,
            "flipped_labels": 0.0,
            "reward": reward,
            "kl": beta,
        }
        for seed, reward in enumerate(rewards)
    ]


# In the mean of seeds 0 and 1 DPO is best at β 1, in that of other seeds at 0.1.
WORKED = [
    *_rewards("DPO", 0.1, [1.0, 1.0, 2.0]),
    *_rewards("DPO", 1.0, [1.5, 1.5, 0.0]),
    *_rewards("ε-DPO", 0.1, [1.0, 1.25, 1.5]),
    *_rewards("ε-DPO", 1.0, [1.5, 1.75, 1.0]),
]


def test_a_seed_has_no_say_in_the_beta_of_its_tuned_dpo():
    base = summary.methods(WORKED, "sweep")["DPO"]
    assert regret.tuned_betas(base) == {0: 0.1, 1: 0.1, 2: 1.0}


def test_regrets_are_those_worked_by_hand():
    found = regret.tests(WORKED, 0.0)
    # seed by seed, mean over β of ε-DPO - DPO: 0, 0.25, 0.25
    assert found.primary == summary.Estimate.of([0.0, 0.25, 0.25])
    # the tuned DPO has 1, 1 and 0
    assert found.at[1.0].baseline == summary.Estimate.of([-0.5, -0.5, 0.0])
    assert found.at[1.0].method == summary.Estimate.of([-0.5, -0.75, -1.0])
    difference = summary.Estimate.of([0.0, 0.25, 1.0], level=0.99)
    assert found.at[1.0].difference == difference
    assert found.cost == summary.Estimate.of([0.0, 0.25, 1.0])
    assert found.tuned == {0.1: 2, 1.0: 1}


@pytest.mark.parametrize(
    ("mean", "half", "spares"), [(0.05, 0.04, True), (0.05, 0.06, False)]
)
def test_the_sweep_is_spared_where_every_interval_ends_below_the_margin(
    mean, half, spares
):
    none, some = summary.Estimate(0.0, 0.0), summary.Estimate(mean, half)
    at = {
        0.1: regret.AtBeta(none, some, none, None),
        1.0: regret.AtBeta(none, none, none, None),
    }
    less = summary.Estimate(-mean, half)
    found = regret.Tests(primary=none, at=at, cost=less, tuned={})
    assert found.spares_the_sweep is found.is_free is spares


def test_a_99_percent_interval_is_students():
    found = summary.Estimate.of([1.0, 2.0, 3.0], level=0.99)
    assert found.half == pytest.approx(9.924843 / math.sqrt(3), rel=1e-6)


@rest
def test_the_smallest_sweep_runs_and_is_tested(tmp_path):
    deciding = [c for c in SMALLEST.cells() if c.method in sweep.DECIDING]
    cells = [c for c in deciding if c.group == "sweep" and not c.world.flipped]
    assert len(cells) == 2 * 2 * 2
    assert run.run(cells, tmp_path, workers=1) == len(cells)
    results = [summary.compact(c, cell.result_file(tmp_path, c)) for c in cells]
    assert {r["steps"] for r in results} == {SMALLEST.steps} == {8}
    for result in summary.select(results, method="DPO"):
        assert result["last_beta"] == result["keys"]["beta"]
    for result in summary.select(results, method="ε-DPO"):
        assert 0.9 < result["last_beta"] / result["keys"]["beta"] < 1.1
        assert result["last_beta"] != result["keys"]["beta"]
    found = regret.tests(results, 0.0)
    gains = [
        sum(
            r["reward"] * (1 if r["method"] == "ε-DPO" else -1)
            for r in summary.select(results, seed=seed)
        )
        / 2
        for seed in (0, 1)
    ]
    assert found.primary.mean == pytest.approx(sum(gains) / 2)


def _result(one: grid.Cell) -> dict:
    """Made-up results: ε-DPO gets 1 + seed at every β, DPO at β 1 alone."""
    beta = one.keys.get("beta", 1.0)
    best = one.method == "ε-DPO" or beta == 1
    return {
        "group": one.group,
        "method": one.method,
        "seed": one.seed,
        "flipped_labels": one.world.flipped,
        "keys": {k: one.keys[k] for k in summary.VARIED if k in one.keys},
        "reward": one.seed + float(best),
        "kl": 1 / beta,
        "last_beta": beta / 2,
        "series": {"kl/beta": [beta, beta / 2]},
        "seconds": {"train": 1.0, "measure": 1.0},
    }


def test_the_page_of_a_sweep_tells_what_the_plan_asks_for(tmp_path):
    whole = {
        "grid": "sweep",
        "date": "today",
        "commit": "0",
        "device": "none",
        "versions": {},
        "minutes": 60,
        "cells": [_result(c) for c in sweep.SWEEP.cells()],
    }
    places = summary.Places(tmp_path / "a.json", tmp_path / "A.md", tmp_path)
    text = sweep_page.text_of(whole, places)
    for labels in ("clean labels", "20% flipped"):
        # DPO loses 1 at four of five β, and ε-DPO nothing
        verdict = (
            f"| {labels} | +0.80 ± 0.00 | yes | +0.00 ± 0.00, none | yes | 1 (8) |"
        )
        assert verdict in text
        assert f"| {labels} | 10 | 3.50 ± 2.05 | 4.50 ± 2.05 | +1.00 ± 0.00 |" in text
    assert "358 cells, 1.0 hours in all" in text
    # DPO and all losses of Table 1 have runs at β 1, or no β
    for method in [*sweep.METHODS, *sweep.LOSSES]:
        assert f"| {method} |" in text.split("## The losses of Table 1")[1]
    pictures = sweep_page.sweep_figures.draw(whole["cells"], tmp_path)
    assert [p.name for p in pictures if p.stat().st_size > 10_000] == [
        "sweep_reward.png",
        "sweep_frontier.png",
        "sweep_beta.png",
    ]
