"""axolotl edpo-report: a page of what was logged, of any run, however it ended."""

import json
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy
import pandas
import pytest
from helpers import tiny
from helpers.commands import forked, installed
from helpers.killed_runs import train_until_killed
from helpers.paths import ROOT
from helpers.report_pages import Page, numbers, observation, page_of, refused, report
from matplotlib.image import imread

from axolotl_edpo.report import figures, logged, runs

KINDS = {
    "epsilon": {"edpo_log_pairs": 1},
    "fixed": {"edpo_control": "fixed", "edpo_epsilon": None, "edpo_log_pairs": 1},
    "batch_margin": {"edpo_control": "batch_margin", "edpo_epsilon": None},
    "dpo": tiny.DPO,
}


@pytest.fixture(scope="module")
def outputs(parts, tmp_path_factory):
    """Ten steps of each kind, with evaluations at 0, 4, 8 and the end."""
    folder = tmp_path_factory.mktemp("runs")
    for name, keys in KINDS.items():
        keys = dict(
            dataset_prepared_path=str(parts["prepared"]),
            output_dir=str(folder / name),
            test_datasets=tiny.dataset(parts["eval"]),
            num_epochs=2,
            eval_steps=4,
            save_strategy="steps",
            save_steps=4,
            **keys,
        )
        tiny.train(folder, tiny.recipe(folder, parts["model"], parts["pairs"], **keys))
    return folder


@pytest.fixture(scope="module")
def small(outputs, tmp_path_factory):
    """The ε-DPO run, of which two curves were logged: drawing takes the longest."""
    folder = tmp_path_factory.mktemp("small") / "epsilon"
    shutil.copytree(outputs / "epsilon", folder)
    kept = {"step", "epoch", "loss", "kl/beta", "eval_loss", "eval_kl/beta"}
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        state, written = json.loads(file.read_text()), file.stat().st_mtime
        state["log_history"] = [
            {name: log[name] for name in log.keys() & kept}
            for log in state["log_history"]
        ]
        file.write_text(json.dumps(state))
        os.utime(file, (written, written))
    return folder


@pytest.fixture
def run(small, tmp_path):
    """A copy of the small run, to damage."""
    return Path(shutil.copytree(small, tmp_path / "epsilon"))


@pytest.fixture(scope="module")
def alone(outputs, tmp_path_factory):
    """Folder of the page of the ε-DPO run."""
    folder = tmp_path_factory.mktemp("alone")
    report(outputs / "epsilon", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def together(outputs, tmp_path_factory):
    """Folder of the page of all runs."""
    folder = tmp_path_factory.mktemp("together")
    report(*(outputs / kind for kind in KINDS), "--out", folder)
    return folder


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


# --- one run -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_that_were_logged(outputs, tmp_path, kind):
    (result,) = numbers(tmp_path, outputs / kind)
    state = state_of(outputs / kind / "checkpoint-10")
    names = [metric.name for metric in logged.METRICS]
    for name in names + [f"eval_{name}" for name in names]:
        logs = [(e["step"], e[name]) for e in state["log_history"] if name in e]
        series = result["logged"].get(name, {"steps": [], "values": []})
        assert [*zip(series["steps"], series["values"], strict=True)] == logs, name
    assert len(result["logged"]["loss"]["steps"]) == 10
    assert result["logged"]["eval_loss"]["steps"] == [0, 4, 8, 10]
    assert result["status"] == "finished: 10 steps"
    assert result["control"] == (None if kind == "dpo" else kind)
    assert result["controller"] == state["stateful_callbacks"].get("EDPO", {})


def test_the_page_says_what_the_run_was_and_where_it_ended(outputs, alone):
    page = Page(alone)
    state = state_of(outputs / "epsilon" / "checkpoint-10")
    first, last = state["log_history"][1], state["log_history"][-2]
    assert first["step"], last["step"] == (1, 10)
    body, rows = page.text(), page.rows()
    assert "finished: 10 steps" in body
    assert "ε-DPO, a β per pair (edpo_control: epsilon)" in body
    beta = state["stateful_callbacks"]["EDPO"]["beta"]
    assert f"0.1 → {beta:.4g}" in page.text("dd")
    assert "LlamaForCausalLM" in page.text("dd")
    assert rows["Loss"] == f"{first['loss']:.4g} → {last['loss']:.4g}"
    assert rows["KL(π‖π_ref) per token, nats"] == f"0 → {last['kl/policy_ref']:.4g}"
    assert "Not logged" not in body and "no evaluation" not in body


def test_every_chart_is_in_the_page_and_a_picture(alone):
    page = Page(alone)
    titles = {
        "KL penalty β",
        "Loss",
        "Reward margin",
        "Share of pairs by s, the β they ask for",
    }
    assert titles <= {*page.text("svg").splitlines()}
    pictures = sorted(path.name for path in alone.glob("*.png"))
    assert pictures == [
        "kl_beta.png",
        "kl_policy_ref.png",
        "learning_rate.png",
        "loss.png",
        "pairs_log_ratio.png",
        "pairs_margins.png",
        "rewards_accuracies.png",
        "rewards_margins.png",
        "shares.png",
    ]
    assert page.source.count("<svg") == page.source.count("<figure>") == len(pictures)
    blue = numpy.array(matplotlib.colors.to_rgb(figures.BLUE))
    for name in pictures:
        image = imread(BytesIO((alone / name).read_bytes()))
        assert image.shape[0] > 400 and image.shape[1] == 800
        drawn = numpy.abs(image[..., :3] - blue).max(axis=-1) < 0.02
        assert 50 < drawn.sum() < 0.2 * drawn.size, name


def test_the_curves_are_where_the_values_are(outputs):
    run = runs.read_run(outputs / "epsilon")
    train, held_out = run.series("kl/beta"), run.series("eval_kl/beta")
    (axes,) = figures.draw_metric(logged.BETA, run).axes
    line, dots = axes.lines
    assert line.get_xdata().tolist() == [*range(1, 11)] == train.steps
    assert line.get_ydata().tolist() == train.values
    assert dots.get_ydata().tolist() == held_out.values
    smaller, same, larger = figures.draw_shares(run).axes[0].lines[:3]
    total = smaller.get_ydata() + same.get_ydata() + larger.get_ydata()
    assert total == pytest.approx(numpy.ones(10))
    assert smaller.get_ydata().tolist() == run.series("kl/p_epsilon_steps").values


@pytest.mark.parametrize("folder", ["alone", "together"])
def test_a_page_needs_no_other_file(request, folder):
    page = Page(request.getfixturevalue(folder))
    assert "http" not in page.source and "<script" not in page.source
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "srcset", "data", "onload", "xmlns"}
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value for name, value in page.attributes if "href" in name}
    assert links <= {f"#{name}" for name in ids} and links
    assert not re.search(r"url\((?!#)|@import", page.source)


def test_the_same_run_makes_the_same_page(outputs, alone, tmp_path):
    assert page_of(tmp_path, outputs / "epsilon").source == Page(alone).source


def test_without_a_folder_the_page_is_put_in_the_run(run):
    index = run / "edpo_report" / "index.html"
    index.parent.mkdir()
    index.write_text("an older page")
    assert report(run) == f"Wrote {index} and 4 pictures beside it.\n"
    assert not list(index.parent.glob("*.partial"))
    assert "finished: 10 steps" in Page(index.parent).text()


def test_a_checkpoint_is_the_run_up_to_it(outputs, tmp_path):
    (result,) = numbers(tmp_path, outputs / "epsilon" / "checkpoint-8")
    assert result["status"] == "8 of 10 steps"
    assert result["logged"]["loss"]["steps"] == [*range(1, 9)]
    assert result["pairs"]["observations"] == 8 * 8  # the trace goes on


@pytest.mark.parametrize("kind", ["fixed", "batch_margin", "dpo"])
def test_what_another_control_does_not_log_is_named(outputs, tmp_path, kind):
    page = page_of(tmp_path, outputs / kind)
    missing = {"fixed": "", "batch_margin": "", "dpo": "β, KL(π‖π_ref), "}[kind]
    note = (
        f"Not logged by this run: {missing}shares of pairs for a smaller or larger β."
    )
    assert note in page.text("p")
    titles = page.text("svg").splitlines()
    assert "Loss" in titles and "Reward accuracy" in titles
    assert ("KL penalty β" in titles) == (kind != "dpo")
    assert ("Average margin M₀, nats" in titles) == (kind == "batch_margin")
    assert not any("the β they ask for" in title for title in titles)


def test_a_run_that_stopped_itself_is_not_called_unfinished(recipe, parts, tmp_path):
    keys = dict(
        test_datasets=tiny.dataset(parts["eval"]),
        learning_rate=0.0,
        num_epochs=4,
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        early_stopping_patience=2,
    )
    trainer = tiny.train(tmp_path, recipe(**keys))
    steps = trainer.state.global_step
    assert steps < 10
    (result,) = numbers(tmp_path, tmp_path / "out")
    assert result["status"] == f"stopped itself after {steps} of 20 steps"


# --- runs that did not end ---------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_an_interrupted_save_is_left_out_and_named(run, tmp_path, damage):
    file = run / "checkpoint-10" / "trainer_state.json"
    text = file.read_text()
    file.unlink() if damage == "missing" else file.write_text(text[: len(text) // 2])
    before = (run / "checkpoint-8" / "trainer_state.json").stat().st_mtime
    for weights in run.glob("*.safetensors"):  # as the kill came before these
        os.utime(weights, (before - 1, before - 1))
    page = page_of(tmp_path / "page", run)
    status = "not finished: 8 of 10 steps, last complete checkpoint checkpoint-8"
    assert status in page.text()
    assert "Not saved to the end, and not read: checkpoint-10." in page.text()
    (result,) = numbers(tmp_path, run)
    assert result["skipped"] == ["checkpoint-10"]
    assert result["logged"]["loss"]["steps"][-1] == 8


def test_a_run_that_kept_no_last_checkpoint_is_not_called_unfinished(run, tmp_path):
    shutil.rmtree(run / "checkpoint-10")
    (result,) = numbers(tmp_path, run)
    assert result["status"].endswith("saved later, those steps are not shown")


def test_a_killed_run_is_read_up_to_its_last_checkpoint(recipe, tmp_path):
    """Killed after step 12, and the trace of steps 11 and 12 with it."""
    keys = recipe(num_epochs=4, save_strategy="steps", save_steps=5, edpo_log_pairs=1)
    train_until_killed(tmp_path, keys, step=12)
    page = page_of(tmp_path / "page", tmp_path / "out")
    status = "not finished: 10 of 20 steps, last complete checkpoint checkpoint-10"
    assert status in page.text()
    assert "80 observations of 40 pairs" in page.text()
    assert "No evaluation up to here" in page.text()


# --- several -----------------------------------------------------------------------


def test_several_runs_have_a_row_each_and_a_path_over_kl(outputs, together, tmp_path):
    paths = [outputs / kind for kind in KINDS]
    page = Page(together)
    rows = [t for tags, t in page.texts if tags[-1] == "th" and "tbody" in tags]
    assert rows == [*KINDS]
    titles = page.text("svg").splitlines()
    assert (
        "Reward accuracy over KL" in titles
        and "Share for a smaller β minus share for a larger one" in titles
    )
    assert titles.count("epsilon") > titles.count("dpo") > 0  # where it logs no KL
    for kind, result in zip(KINDS, numbers(tmp_path, *paths), strict=True):
        log = state_of(outputs / kind / "checkpoint-10")["log_history"]
        evaluations = [e for e in log if "eval_loss" in e and e["step"] > 0]
        expected = [
            {
                "step": e["step"],
                "kl": e["eval_kl/policy_ref"],
                "gain": e["eval_rewards/accuracies"],
            }
            for e in evaluations
            if kind != "dpo"
        ]
        assert result["frontier"]["rewards/accuracies"] == expected
        assert result["name"] == kind
    assert len(expected) == 0 and len(evaluations) == 3


def test_names_are_what_sets_paths_apart(outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(outputs)
    same = [Path("epsilon"), outputs / "dpo", outputs / "epsilon"]
    assert [result["name"] for result in numbers(tmp_path, *same)] == ["epsilon", "dpo"]
    shutil.copytree(outputs / "dpo", tmp_path / "_a$b$" / "out")
    shutil.copytree(outputs / "dpo", tmp_path / "<i>" / "out")
    page = page_of(tmp_path / "page", tmp_path / "_a$b$/out", tmp_path / "<i>/out")
    assert {"./_a$b$/out", "<i>/out"} <= {*page.text("svg").splitlines()}


# --- what is no run ----------------------------------------------------------------


def test_what_is_no_run_is_named_in_one_line_with_a_remedy(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "nowhere").endswith("nowhere: there is no such directory")
    assert refused(run, tmp_path / "empty") == (
        f"Error: {tmp_path / 'empty'}: no run: it has neither checkpoint-* nor "
        "trainer_state.json: name the `output_dir` of a recipe that saves checkpoints"
    )
    for name in ("checkpoint-4", "checkpoint-8", "checkpoint-10"):
        (run / name / "trainer_state.json").write_text("{")
    assert refused(run) == (
        f"Error: {run}: no checkpoint was saved to its end (there is checkpoint-4, "
        "checkpoint-8, checkpoint-10): let the run reach its next one"
    )
    assert f"name its run, {run}," in refused(run / "checkpoint-8")


def test_a_folder_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(run, "--out", tmp_path / "file" / "page")
    assert line.endswith("Not a directory: name another `--out`")


# --- pairs -------------------------------------------------------------------------


def write_trace(run: Path, *files: list[dict]) -> None:
    shutil.rmtree(run / "edpo_pairs")
    (run / "edpo_pairs").mkdir()
    for number, rows in enumerate(files):
        path = run / "edpo_pairs" / f"steps-{number:08}-{number:08}-rank0.parquet"
        pandas.DataFrame(rows).to_parquet(path)


def test_pairs_are_ranked_by_the_mean_of_their_log_ratio(run, tmp_path):
    texts = dict(prompt="Why?", chosen="<script>alert(1)</script>", rejected="No & no")
    write_trace(
        run,
        [
            observation(1, "sure", 1, 1.0, **texts),
            observation(1, "flipped", -1, -1.0, **texts),
            observation(2, "sure", 1, 2.0),
        ],
        [
            observation(3, "flipped", -1, -0.5, kl=0.75, **texts),
            observation(4, "mixed", 1, 0.5, **texts),
            observation(5, "mixed", -1, 0.0),
            observation(11, "late", 1, 9.0),  # the run is known up to 10
        ],
    )
    (result,) = numbers(tmp_path, run)
    flipped, mixed, sure = result["pairs"]["pairs"]
    assert [pair["id"] for pair in (flipped, mixed, sure)] == [
        "flipped",
        "mixed",
        "sure",
    ]
    assert (flipped["seen"], flipped["larger"], flipped["smaller"]) == (2, 1.0, 0.0)
    assert flipped["log_ratio"] == (-1.0 - 0.5) / 2 / 0.5
    assert (flipped["margin"], flipped["kl"]) == (-0.5, 0.75)  # the last ones
    assert (mixed["mean_step"], mixed["smaller"], mixed["larger"]) == (0.0, 0.5, 0.5)
    assert (sure["log_ratio"], sure["chosen_tokens"]) == (3.0, 5)
    page = page_of(tmp_path / "page", run)
    assert (
        "Of the 3 seen more than once, 1 asked for a smaller β each time and 1 for"
        in page.text()
    )
    assert "<script" not in page.source
    assert page.text("dd").count("<script>alert(1)</script>") == 3
    assert "No & no" in page.text("dd")


def test_a_pair_seen_once_is_ranked_by_more_than_a_sign(run, tmp_path):
    rows = [observation(1, f"pair {i}", -1, -0.1 * i) for i in range(30)]
    write_trace(run, rows)
    page = page_of(tmp_path / "page", run)
    assert "Each was seen once." in page.text()
    (result,) = numbers(tmp_path, run)
    names = [pair["id"] for pair in result["pairs"]["pairs"]]
    assert names == [f"pair {i}" for i in reversed(range(30))]


def test_pairs_of_a_control_without_steps_are_ranked_and_move_nowhere(run, tmp_path):
    rows = [observation(1, f"pair {i}", None, 0.1 * i) for i in range(4)]
    write_trace(run, rows)
    (result,) = numbers(tmp_path, run)
    assert {pair["smaller"] for pair in result["pairs"]["pairs"]} == {None}
    assert list(result["pairs"]["margin_by_step"]) == ["all"]
    page = page_of(tmp_path / "page", run)
    assert "Under this control pairs ask for no β" in page.text()
    assert "Mean margin of traced pairs" in page.text("svg").splitlines()


def test_long_texts_are_folded_between_words_and_none_is_lost(run, tmp_path):
    long = " ".join(f"word{i}" for i in range(200))
    texts = dict(prompt=long, chosen="", rejected="<b>" * 200)
    write_trace(run, [observation(1, "a", 1, 1.0, **texts)])
    page = page_of(tmp_path / "page", run)
    start, cut = page.text("summary").split(" …\n")
    assert start.split() == long.split()[: len(start.split())]
    assert 200 < len(start) <= len(cut) - len(" …") == 280
    pieces = page.text("details").replace(" …", "").split("\n")
    assert " ".join(pieces[:2]) == long
    assert "".join(pieces[2:]) == "<b>" * 200


def test_a_real_trace_agrees_with_what_was_logged(outputs, tmp_path):
    result, fixed = numbers(tmp_path, outputs / "epsilon", outputs / "fixed")
    log = result["logged"]
    pairs = result["pairs"]["pairs"]
    assert len(pairs) == 40 and {pair["seen"] for pair in pairs} == {2}
    for name, share in (
        ("kl/p_epsilon_steps", "smaller"),
        ("kl/n_epsilon_steps", "larger"),
    ):
        mean = sum(pair[share] for pair in pairs) / 40
        assert mean == pytest.approx(sum(log[name]["values"]) / 10)
    margin = fixed["pairs"]["margin_by_step"]["all"]["margin"]
    assert margin == pytest.approx(fixed["logged"]["rewards/margins"]["values"], 1e-4)
    ratios = [pair["log_ratio"] for pair in pairs]
    assert ratios == sorted(ratios) and ratios[0] < 0 < ratios[-1]


def test_a_damaged_trace_is_named(run):
    (file,) = [*(run / "edpo_pairs").iterdir()][:1]
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(run) == f"Error: {file}: not a whole Parquet file: remove it"


# --- the command -------------------------------------------------------------------


def test_the_installed_command_writes_a_page_and_numbers(run, tmp_path):
    """Needs the package installed with its entry points."""
    done = installed(tmp_path, "edpo-report", str(run), "--json", "numbers.json")
    assert done.returncode == 0, done.stdout
    (result,) = json.loads((tmp_path / "numbers.json").read_text())["runs"]
    assert result["logged"]["kl/beta"]["values"][0] == 0.1
    done = forked(tmp_path, "edpo-report", str(run), str(run / "checkpoint-4"))
    assert "Wrote edpo_report/index.html and" in done.stdout
    assert "2 runs" in Page(tmp_path / "edpo_report").text("h1")
    done = forked(tmp_path, "edpo-report", "nowhere")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "Error: nowhere: there is no such directory"


def test_numbers_can_be_piped_and_neither_torch_nor_axolotl_is_imported(run):
    """The module prints no banner; what it imports is named by Python itself."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "axolotl_edpo.report"]
        + [str(run), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["runs"][0]["steps"] == 10
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "pandas" in imported
    assert not imported & {"torch", "transformers", "axolotl"}
