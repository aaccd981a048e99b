"""report/: a page says what was logged, of any kind of run, however it ended."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy
import pandas
import pytest
from click.testing import CliRunner
from helpers import tiny
from helpers.commands import command
from helpers.killed_runs import train_until_killed
from helpers.paths import ROOT
from matplotlib.image import imread
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_edpo import run_files as saved
from axolotl_edpo.report import figures, logged, runs, trace
from axolotl_edpo.report.command import edpo_report

KINDS = {
    "epsilon": {"edpo_log_pairs": 1},
    "fixed": {"edpo_control": "fixed", "edpo_epsilon": None, "edpo_log_pairs": 1},
    "batch_margin": {"edpo_control": "batch_margin", "edpo_epsilon": None},
    "dpo": tiny.DPO,
}
VOID = {"meta", "img", "br"}


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


@pytest.fixture
def run(outputs, tmp_path):
    """A copy of the ε-DPO run, to damage."""
    return Path(shutil.copytree(outputs / "epsilon", tmp_path / "epsilon"))


def report(*words) -> str:
    """Runs the command and returns what it printed."""
    result = CliRunner().invoke(edpo_report, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words) -> str:
    """The one line with which the command fails."""
    result = CliRunner().invoke(edpo_report, [*map(str, words)])
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    return line


def numbers(tmp_path, *paths) -> list[dict]:
    """What `--json` writes of each run."""
    report(*paths, "--json", tmp_path / "numbers.json")
    return json.loads((tmp_path / "numbers.json").read_text())["runs"]


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


class Page(HTMLParser):
    """A page that was written: its tags balanced, its text by the tag it is in."""

    def __init__(self, folder: Path):
        super().__init__()
        self.source = (folder / "index.html").read_text(encoding="utf-8")
        self.open, self.texts, self.attributes = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_data(self, data):
        if data.strip():
            self.texts.append((tuple(self.open), data.strip()))

    def text(self, within: str = "body") -> str:
        """All text in a kind of element, a line each."""
        return "\n".join(text for tags, text in self.texts if within in tags)

    def rows(self) -> dict[str, str]:
        """First and second cell of the tables of runs."""
        cells = [text for tags, text in self.texts if {*tags} & {"th", "td"}]
        return dict(zip(cells, cells[1:], strict=False))


def page_of(folder: Path, *paths) -> Page:
    report(*paths, "--out", folder)
    return Page(folder)


# --- one run -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_that_were_logged(outputs, tmp_path, kind):
    (made,) = numbers(tmp_path, outputs / kind)
    state = state_of(outputs / kind / "checkpoint-10")
    names = [metric.name for metric in logged.METRICS]
    for name in names + [f"eval_{name}" for name in names]:
        said = [(e["step"], e[name]) for e in state["log_history"] if name in e]
        read = made["logged"].get(name, {"steps": [], "values": []})
        assert [*zip(read["steps"], read["values"], strict=True)] == said, name
    assert len(made["logged"]["loss"]["steps"]) == 10
    assert made["logged"]["eval_loss"]["steps"] == [0, 4, 8, 10]
    assert made["status"] == "finished: 10 steps"
    assert made["control"] == (None if kind == "dpo" else kind)
    assert made["controller"] == state["stateful_callbacks"].get("EDPO", {})


def test_the_page_says_what_the_run_was_and_where_it_ended(outputs, tmp_path):
    page = page_of(tmp_path, outputs / "epsilon")
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


def test_every_chart_is_in_the_page_and_a_picture(outputs, tmp_path):
    page = page_of(tmp_path, outputs / "epsilon")
    titles = {"KL penalty β", "Loss", "Reward margin", "Share of pairs, by how β̃ moved"}
    assert titles <= {*page.text("svg").splitlines()}
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
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
        image = imread(BytesIO((tmp_path / name).read_bytes()))
        assert image.shape[0] > 400 and image.shape[1] == 800
        drawn = numpy.abs(image[..., :3] - blue).max(axis=-1) < 0.02
        assert 50 < drawn.sum() < 0.2 * drawn.size, name


def test_the_curves_are_where_the_values_are(outputs):
    run = runs.read_run(outputs / "epsilon")
    train, held_out = run.series("kl/beta"), run.series("eval_kl/beta")
    (axes,) = figures.draw_metric(logged.BETA, train, held_out).axes
    line, dots = axes.lines
    assert line.get_xdata().tolist() == [*range(1, 11)] == train.steps
    assert line.get_ydata().tolist() == train.values
    assert dots.get_ydata().tolist() == held_out.values
    up, still, down = figures.draw_shares(run).axes[0].lines[:3]
    total = up.get_ydata() + still.get_ydata() + down.get_ydata()
    assert total == pytest.approx(numpy.ones(10))
    assert up.get_ydata().tolist() == run.series("kl/p_epsilon_steps").values


def test_a_smooth_line_is_a_mean_of_what_is_near_and_starts_where_values_do():
    assert figures.smooth([1, 2, 6, 3], 1) == [1, 2, 6, 3]
    assert figures.smooth([1, 2, 6, 3, 9], 3) == [1, 3, 11 / 3, 6, 6]
    assert [figures.window(count) for count in (1, 15, 16, 94, 320)] == [
        1,
        1,
        3,
        11,
        41,
    ]


@pytest.mark.parametrize("paths", [["epsilon"], ["epsilon", "dpo"]], ids=len)
def test_a_page_needs_no_other_file(outputs, tmp_path, paths):
    page = page_of(tmp_path, *(outputs / path for path in paths))
    assert "http" not in page.source and "<script" not in page.source
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "srcset", "data", "onload", "xmlns"}
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value for name, value in page.attributes if "href" in name}
    assert links <= {f"#{name}" for name in ids} and links
    assert not re.search(r"url\((?!#)|@import", page.source)


def test_the_same_run_makes_the_same_page(outputs, tmp_path):
    pages = [page_of(tmp_path / name, outputs / "epsilon").source for name in "ab"]
    assert pages[0] == pages[1]


def test_without_a_folder_the_page_is_put_in_the_run(run):
    printed = report(run)
    index = run / "edpo_report" / "index.html"
    assert printed == f"Wrote {index} and 9 pictures beside it.\n"
    assert not list(index.parent.glob("*.partial"))
    index.write_text("an older page")
    report(run)
    assert "finished: 10 steps" in Page(index.parent).text()


def test_a_checkpoint_is_the_run_up_to_it(outputs, tmp_path):
    (made,) = numbers(tmp_path, outputs / "epsilon" / "checkpoint-8")
    assert made["status"] == "8 of 10 steps"
    assert made["logged"]["loss"]["steps"] == [*range(1, 9)]
    assert made["pairs"]["observations"] == 8 * 8  # the trace goes on


@pytest.mark.parametrize("kind", ["fixed", "batch_margin", "dpo"])
def test_what_another_control_does_not_log_is_named(outputs, tmp_path, kind):
    page = page_of(tmp_path, outputs / kind)
    missing = {"fixed": "", "batch_margin": "", "dpo": "β, KL(π‖π_ref), "}[kind]
    said = f"Not logged by this run: {missing}shares of pairs moved."
    assert said in page.text("p")
    titles = page.text("svg").splitlines()
    assert "Loss" in titles and "Reward accuracy" in titles
    assert ("KL penalty β" in titles) == (kind != "dpo")
    assert ("Average margin M₀, nats" in titles) == (kind == "batch_margin")
    assert not any("how β̃ moved" in title for title in titles)


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
    (made,) = numbers(tmp_path, tmp_path / "out")
    assert made["status"] == f"stopped itself after {steps} of 20 steps"


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
    (made,) = numbers(tmp_path, run)
    assert made["skipped"] == ["checkpoint-10"]
    assert made["logged"]["loss"]["steps"][-1] == 8


def test_a_run_that_kept_no_last_checkpoint_is_not_called_unfinished(run, tmp_path):
    shutil.rmtree(run / "checkpoint-10")
    (made,) = numbers(tmp_path, run)
    assert made["status"].endswith("saved later, those steps are not shown")


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


def test_several_runs_have_a_row_each_and_a_path_over_kl(outputs, tmp_path):
    paths = [outputs / kind for kind in KINDS]
    page = page_of(tmp_path / "page", *paths)
    rows = [t for tags, t in page.texts if tags[-1] == "th" and "tbody" in tags]
    assert rows == [*KINDS]
    titles = page.text("svg").splitlines()
    assert "Reward accuracy over KL" in titles and "Moved up minus moved down" in titles
    assert titles.count("epsilon") > titles.count("dpo") > 0  # where it logs no KL
    for kind, made in zip(KINDS, numbers(tmp_path, *paths), strict=True):
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
        assert made["frontier"]["rewards/accuracies"] == expected
        assert made["name"] == kind
    assert len(expected) == 0 and len(evaluations) == 3


def test_an_evaluation_without_kl_is_put_where_training_was():
    log = [
        {"step": 0, "eval_rewards/accuracies": 0.0},
        {"step": 2, "kl/policy_ref": 0.25},
        {"step": 4, "kl/policy_ref": 0.5},
        {"step": 5, "eval_rewards/accuracies": 0.75},
    ]
    run = runs.Run(Path("out"), Path("out"), {"global_step": 5, "log_history": log})
    assert runs.path_over_kl(run, logged.ACCURACY) == [(5, 0.5, 0.75)]
    assert runs.path_over_kl(run, logged.MARGIN) == []


def test_names_are_what_sets_paths_apart(outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(outputs)
    same = [Path("epsilon"), outputs / "dpo", outputs / "epsilon"]
    assert [made["name"] for made in numbers(tmp_path, *same)] == ["epsilon", "dpo"]
    shutil.copytree(outputs / "dpo", tmp_path / "_a$b$" / "out")
    shutil.copytree(outputs / "dpo", tmp_path / "<i>" / "out")
    page = page_of(tmp_path / "page", tmp_path / "_a$b$/out", tmp_path / "<i>/out")
    assert {"./_a$b$/out", "<i>/out"} <= {*page.text("svg").splitlines()}


def test_runs_look_different_without_colour_too():
    looks = figures.looks(8)
    assert len({look.colour for look in looks[:7]}) == 7
    assert len({(look.line, look.marker) for look in looks}) == 8


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


@pytest.mark.parametrize("log", [[], [{"step": 3, "train_runtime": 1.5}]], ids=len)
def test_a_state_without_logs_is_named(tmp_path, log):
    state = {"global_step": 3, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert refused(tmp_path).endswith(
        "nothing was logged up to step 3: train with a smaller `logging_steps`"
    )


def test_json_that_no_trainer_wrote_is_named(tmp_path):
    (tmp_path / "trainer_state.json").write_text("[]")
    assert "not written by a trainer" in refused(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(run, "--out", tmp_path / "file" / "page")
    assert line.endswith("Not a directory: name another `--out`")


# --- pairs -------------------------------------------------------------------------


def observation(step: int, name: str, move: int | None, margin: float, **more) -> dict:
    """A row of a trace, β̃ 0.5."""
    plus = None if move is None else 0.01 * move
    row = dict(global_step=step, id=name, plus=plus, minus=plus and -plus, step=move)
    row |= dict(beta=0.5, margin=margin, kl=0.25, prompt_tokens=3)
    row |= dict(chosen_tokens=5, rejected_tokens=7)
    return row | dict(prompt=None, chosen=None, rejected=None) | more


def write_trace(run: Path, *files: list[dict]) -> None:
    shutil.rmtree(run / "edpo_pairs")
    (run / "edpo_pairs").mkdir()
    for number, rows in enumerate(files):
        path = run / "edpo_pairs" / f"steps-{number:08}-{number:08}-rank0.parquet"
        pandas.DataFrame(rows).to_parquet(path)


def test_pairs_are_ranked_by_the_mean_of_their_log_ratio(run, tmp_path):
    told = dict(prompt="Why?", chosen="<script>alert(1)</script>", rejected="No & no")
    write_trace(
        run,
        [
            observation(1, "sure", 1, 1.0, **told),
            observation(1, "flipped", -1, -1.0, **told),
            observation(2, "sure", 1, 2.0),
        ],
        [
            observation(3, "flipped", -1, -0.5, kl=0.75, **told),
            observation(4, "mixed", 1, 0.5, **told),
            observation(5, "mixed", -1, 0.0),
            observation(11, "late", 1, 9.0),  # the run is known up to 10
        ],
    )
    (made,) = numbers(tmp_path, run)
    flipped, mixed, sure = made["pairs"]["pairs"]
    assert [pair["id"] for pair in (flipped, mixed, sure)] == [
        "flipped",
        "mixed",
        "sure",
    ]
    assert (flipped["seen"], flipped["down"], flipped["up"]) == (2, 1.0, 0.0)
    assert flipped["log_ratio"] == (-1.0 - 0.5) / 2 / 0.5
    assert (flipped["margin"], flipped["kl"]) == (-0.5, 0.75)  # the last ones
    assert (mixed["mean_step"], mixed["up"], mixed["down"]) == (0.0, 0.5, 0.5)
    assert (sure["log_ratio"], sure["chosen_tokens"]) == (3.0, 5)
    page = page_of(tmp_path / "page", run)
    assert (
        "Of the 3 seen more than once, 1 moved up each time and 1 down" in page.text()
    )
    assert "<script" not in page.source
    assert page.text("dd").count("<script>alert(1)</script>") == 3
    assert "No & no" in page.text("dd")


def test_a_pair_seen_once_is_ranked_by_more_than_a_sign(run, tmp_path):
    rows = [observation(1, f"pair {i}", -1, -0.1 * i) for i in range(30)]
    write_trace(run, rows)
    page = page_of(tmp_path / "page", run)
    assert "Each was seen once." in page.text()
    (made,) = numbers(tmp_path, run)
    names = [pair["id"] for pair in made["pairs"]["pairs"]]
    assert names == [f"pair {i}" for i in reversed(range(30))]


def test_pairs_of_a_control_without_steps_are_ranked_and_move_nowhere(run, tmp_path):
    rows = [observation(1, f"pair {i}", None, 0.1 * i) for i in range(4)]
    write_trace(run, rows)
    (made,) = numbers(tmp_path, run)
    assert {pair["up"] for pair in made["pairs"]["pairs"]} == {None}
    assert list(made["pairs"]["margin_by_step"]) == ["all"]
    page = page_of(tmp_path / "page", run)
    assert "Under this control pairs do not move" in page.text()
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


def test_margins_by_step_are_means_of_their_class():
    rows = [observation(s, f"{s}{i}", 1, s + i) for s in (1, 2, 50) for i in range(3)]
    rows += [observation(50, f"down {i}", -1, -2.0 * i) for i in range(3)]
    rows += [observation(50, "alone", 0, 7.0)]  # a mean of one is no curve
    curves = trace.margin_by_step(pandas.DataFrame(rows))
    assert [*curves] == [1, -1]
    up, down = (curve.to_dict("list") for curve in curves.values())
    # 50 steps make 25 stretches of two
    assert up == {"global_step": [1.5, 50], "margin": [2.5, 51], "count": [6, 3]}
    assert down == {"global_step": [50], "margin": [-2.0], "count": [3]}


def test_a_real_trace_agrees_with_what_was_logged(outputs, tmp_path):
    made, fixed = numbers(tmp_path, outputs / "epsilon", outputs / "fixed")
    log = made["logged"]
    pairs = made["pairs"]["pairs"]
    assert len(pairs) == 40 and {pair["seen"] for pair in pairs} == {2}
    for name, share in (("kl/p_epsilon_steps", "up"), ("kl/n_epsilon_steps", "down")):
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
    done = command(tmp_path, "edpo-report", str(run), "--json", "numbers.json")
    assert done.returncode == 0, done.stdout
    (made,) = json.loads((tmp_path / "numbers.json").read_text())["runs"]
    assert made["logged"]["kl/beta"]["values"][0] == 0.1
    done = command(tmp_path, "edpo-report", str(run), str(run / "checkpoint-4"))
    assert "Wrote edpo_report/index.html and" in done.stdout
    assert "2 runs" in Page(tmp_path / "edpo_report").text("h1")
    done = command(tmp_path, "edpo-report", "nowhere")
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


def test_the_plugin_imports_nothing_that_draws():
    script = "import sys, axolotl_edpo.plugin; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "axolotl_edpo.plugin" in done.stdout
    assert not {"matplotlib", "axolotl_edpo.report"} & {*done.stdout.split()}


def test_checkpoints_have_the_names_that_transformers_gives():
    assert saved.STATE == TRAINER_STATE_NAME
    assert saved.PREFIX == f"{PREFIX_CHECKPOINT_DIR}-"
