"""axolotl edpo-score: what an evaluation of the run logs, after the run."""

import json
import shutil
import subprocess
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from helpers import tiny
from helpers.commands import environment, forked
from helpers.engines import engine
from helpers.releases import needs_divided_rows
from helpers.report_pages import numbers, page_of, refused
from helpers.tiers import first, rest

from axolotl_edpo.run_files import SCORES
from axolotl_edpo.scores import score
from axolotl_edpo.scores.command import edpo_score

SETS = ("easy", "hard")
SAVED = dict(eval_steps=2, save_strategy="steps", save_steps=2, eval_batch_size=3)
PACKED = {"sample_packing": True}
FIXED = {"edpo_control": "fixed", "edpo_epsilon": None}
# Runs of five steps; evaluations and checkpoints are in steps 2, 4 and 5.
RUNS = {
    "full": {},
    "lora": {**tiny.LORA, **PACKED},
    "full packed": PACKED,
    "lora padded": tiny.LORA,
    "cached": tiny.CACHED,
    "two numbers": {**tiny.CACHED, **FIXED},
    "beta-dpo": {"edpo_control": "batch_margin", "edpo_epsilon": None},
    "no reference": {**FIXED, "dpo_loss_type": ["simpo"], **PACKED},
    "sft": {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.5]},
    "tr-dpo": {
        "trl": {"sync_ref_model": True, "ref_model_sync_steps": 2}
        | {"ref_model_mixup_alpha": 0.6}
    },
    "new tokens": {"tokens": ["<one>", "<two>"]},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[dict]:
    """`test_datasets:` of seven and of five pairs."""
    folder = tmp_path_factory.mktemp("sets")
    counts = zip(SETS, (7, 5), strict=True)
    files = [tiny.save_pairs(folder / f"{n}.jsonl", c, seed=c) for n, c in counts]
    return [entry for file in files for entry in tiny.dataset(file)]


@pytest.fixture(scope="module")
def trained(parts, sets, tmp_path_factory):
    """A function that makes one of RUNS once: its folder, and what it logged."""
    made: dict[str, tuple[Path, list[dict]]] = {}

    def train(name: str) -> tuple[Path, list[dict]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            keys = {**SAVED, **RUNS[name], "test_datasets": sets}
            keys["dataset_prepared_path"] = str(parts["prepared"])
            keys = tiny.recipe(folder, parts["model"], parts["pairs"], **keys)
            made[name] = folder, tiny.train(folder, keys).state.log_history
        return made[name]

    return train


@pytest.fixture(scope="module")
def full(trained) -> Path:
    """The folder of a run that trained all weights."""
    return trained("full")[0]


def invoke(folder: Path, *words: object) -> Result:
    """Runs the command on the recipe of a folder."""
    return CliRunner().invoke(edpo_score, [*map(str, [folder / "recipe.yml", *words])])


def scored(folder: Path, model: str = "out") -> list[dict]:
    """The scores of all pairs and of each set."""
    recipe = str(folder / "recipe.yml")
    return score.score(recipe, folder / model, "test_datasets").sets


def evaluations(log: list[dict]) -> dict[int, dict]:
    """The evaluations of a run, by step."""
    return {entry["step"]: entry for entry in log if "eval_loss" in entry}


def assert_logged(sets: list[dict], entry: dict) -> None:
    """Scores are what an evaluation logged, to 1e-6."""
    assert [one["name"] for one in sets] == ["", *SETS]
    assert [one["pairs"] for one in sets] == [12, 7, 5]
    for one in sets:
        prefix = f"eval_{one['name']}_" if one["name"] else "eval_"
        for key, metric in score.METRICS.items():
            expected = entry.get(prefix + metric)
            if expected is not None:  # the run may know less: a reference by answers
                assert one[key] == pytest.approx(expected, rel=1e-6, abs=1e-6), key


@pytest.mark.parametrize("model", ["out", "out/checkpoint-2"])
@pytest.mark.parametrize("name", first([*RUNS], 2))
def test_scores_are_what_the_run_itself_evaluated(trained, name, model):
    folder, log = trained(name)
    step = 2 if model.endswith("-2") else 5
    sets = scored(folder, model)
    assert_logged(sets, evaluations(log)[step])
    assert sets[0]["margin"] != 0


@pytest.mark.parametrize(("name", "loads"), [("no reference", False), ("full", True)])
def test_a_second_model_is_loaded_only_for_a_reference(
    trained, monkeypatch, name, loads
):
    references, evaluate = [], score._evaluate

    def seen(trainer, *arguments):
        references.append(trainer.ref_model)
        return evaluate(trainer, *arguments)

    monkeypatch.setattr(score, "_evaluate", seen)
    scored(trained(name)[0])
    assert [reference is not None for reference in references] == [loads]


def test_the_table_names_model_beta_and_each_set(full):
    """`--model` is the recipe's `output_dir` unless another is named."""
    result, sets = invoke(full), scored(full)
    assert result.exit_code == 0, result.output
    head, beta, names, *rows = result.stdout.splitlines()[-6:]
    checkpoint = full / "out" / "checkpoint-5"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["EDPO"]["beta"]
    assert head.endswith(f"{full / 'out'}: pairs of `test_datasets`")
    assert beta == f"β = {saved:.6g}, of {checkpoint}" and saved != 0.1
    expected = "pairs accuracy margin chosen rejected KL/token loss"
    assert names.split() == expected.split()
    counts = [["all", "12"], ["easy", "7"], ["hard", "5"]]
    assert [row.split()[:2] for row in rows] == counts
    values = [f"{value:.4f}" for value in [*sets[0].values()][2:]]
    assert rows[0].split()[2:] == values


def test_rows_are_those_of_the_summary(full, tmp_path):
    file = tmp_path / "new" / "scores.parquet"
    result = invoke(full, "--output", file)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"Wrote {file}: 12 pairs."
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    rows, table = pandas.read_parquet(file), pq.read_table(file)
    summary = json.loads(table.schema.metadata[SCORES.encode()])
    assert summary["model"] == str(full / "out") and summary["sets"] == scored(full)
    assert set(rows["global_step"]) == {5} and rows["id"].is_unique
    assert rows["prompt"].str.startswith("[user]").all()
    for one in summary["sets"]:
        of_set = rows[rows["set"] == one["name"]] if one["name"] else rows
        tokens = of_set["chosen_tokens"] + of_set["rejected_tokens"]
        means = {
            "pairs": len(of_set),
            "accuracy": (of_set["margin"] > 0).mean(),
            "kl": (of_set["kl"] * tokens).sum() / tokens.sum(),
        }
        for key in ("margin", "chosen_reward", "rejected_reward", "loss"):
            means[key] = of_set[key].mean()
        for key, mean in means.items():
            assert mean == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    differences = rows["chosen_reward"] - rows["rejected_reward"]
    assert differences.tolist() == pytest.approx(rows["margin"].tolist(), abs=1e-6)


def test_training_pairs_are_scored_where_asked_for(full, tmp_path):
    file = tmp_path / "train.parquet"
    result = invoke(full, "--split", "datasets", "--output", file)
    assert result.exit_code == 0, result.output
    rows = pandas.read_parquet(file)
    assert len(rows) == 40 and rows["set"].isna().all()
    assert "pairs of `datasets`" in result.output


def test_a_killed_scoring_leaves_the_file_as_it_was(full, tmp_path, monkeypatch):
    file = tmp_path / "scores.parquet"
    file.write_bytes(b"before")
    (tmp_path / ".scores.parquet.parts").mkdir()  # of one that was killed

    def half(table, where, write=pq.write_table, **keywords):
        if "steps-" in Path(where).name:  # a part
            return write(table, where, **keywords)
        Path(where).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", half)
        invoke(full, "--output", file)
    assert file.read_bytes() == b"before"
    invoke(full, "--output", file)
    assert len(pandas.read_parquet(file)) == 12
    assert [*tmp_path.iterdir()] == [file]


# --- β, and what is not scored -----------------------------------------------------


def copied(folder: Path, to: Path) -> Path:
    """A copy of a run's weights without its checkpoints."""
    skipped = shutil.ignore_patterns("checkpoint-*")
    return Path(shutil.copytree(folder / "out", to, ignore=skipped))


def test_without_a_saved_state_beta_is_that_of_the_recipe(full, tmp_path):
    result = invoke(full, "--model", copied(full, tmp_path / "alone"))
    assert result.exit_code == 0, result.output
    line = "β = 0.1, of the recipe, as the model's folder holds none"
    assert line in result.stdout.splitlines()


def error(folder: Path, *words: object) -> str:
    """The one line with which the command refuses."""
    result = invoke(folder, *words)
    assert result.exit_code == 1, result.output
    return result.stderr.splitlines()[-1]


def changed(folder: Path, to: Path, **keys) -> Path:
    """A folder with the recipe of a run, of which keys differ."""
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    to.mkdir()
    keys = {
        key: value for key, value in {**recipe, **keys}.items() if value is not None
    }
    tiny.write(to, keys)
    return to


def test_the_log_of_the_run_is_left_alone(full):
    """In a process of its own: axolotl begins a log once per process."""
    log = full / "out" / "debug.log"
    log.write_text("of the run")
    done = forked(full, "edpo-score", "recipe.yml")
    assert done.returncode == 0, done.stdout
    assert log.read_text() == "of the run"


def test_folders_without_the_weights_of_the_recipe_are_refused(full, trained, tmp_path):
    lora = trained("lora")[0]
    (empty := tmp_path / "empty").mkdir()
    absent = f"Error: `--model {tmp_path / 'absent'}`: there is no such folder: "
    assert error(full, "--model", tmp_path / "absent").startswith(absent)
    assert f"{empty}` holds no weights: name the" in error(full, "--model", empty)
    assert f"{empty}` holds no adapter, and" in error(lora, "--model", empty)
    line = error(full, "--model", lora / "out")
    assert "holds an adapter, and the recipe has no `adapter`: add it" in line
    line = error(lora, "--model", full / "out")
    assert "holds whole weights, and the recipe has `adapter: lora`" in line


def test_an_adapter_of_another_model_is_refused(trained, tmp_path):
    lora = trained("lora")[0]
    other = copied(lora, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another/model"
    (other / "adapter_config.json").write_text(json.dumps(config))
    line = error(lora, "--model", other)
    assert "holds an adapter of another/model, and the recipe has `base_model" in line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 300}, "has a vocabulary of 300 tokens, and the recipe one of"),
        (
            {"num_hidden_layers": 1},
            "its config has `num_hidden_layers: 1` instead of 2",
        ),
    ],
)
def test_weights_of_another_model_are_refused(full, tmp_path, config, message):
    other = tiny.save_model(tmp_path / "other", **config)
    assert message in error(full, "--model", other)


def test_recipes_that_cannot_be_scored_are_refused(full, tmp_path):
    keys = dict(tiny.DPO, plugins=None)
    foreign = changed(full, tmp_path / "dpo", **keys)
    assert error(foreign).startswith("Error: `axolotl edpo-score` scores the pairs of")
    divided = {"context_parallel_size": 2, "sample_packing": True}
    divided |= {"test_datasets": None, "eval_steps": None}
    divided = changed(full, tmp_path / "divided", **divided)  # one process divides none
    assert error(divided).startswith("Error: the recipe has no pairs to score: set ")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    kept = changed(full, tmp_path / "best", **best)
    assert "may hold the weights of the best step" in error(kept)
    without = changed(full, tmp_path / "without", test_datasets=None, eval_steps=None)
    assert error(without).startswith("Error: the recipe has no pairs to score: set ")
    (tmp_path / "recipe.yml").write_text("rl: edpo\n  beta: 1")
    assert "recipe.yml is no YAML: mapping values are not" in error(tmp_path)
    result = invoke(full, "--", "--nproc_per_node=2")
    assert result.exit_code == 2 and "takes no --nproc_per_node=2" in result.output


# --- adapters that were trained further --------------------------------------------


@rest
def test_an_adapter_that_was_trained_further_has_its_start_as_reference(
    trained, tmp_path
):
    lora, _ = trained("lora")
    keys = dict(lora_model_dir=str(lora / "out"), output_dir=str(tmp_path / "out"))
    folder = changed(lora, tmp_path / "further", **keys)
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    log = tiny.train(folder, recipe).state.log_history
    sets = score.score(str(folder / "recipe.yml"), None, "test_datasets").sets
    assert_logged(sets, evaluations(log)[5])


@rest
def test_an_adapter_over_four_bits_scores_as_it_evaluated(parts, sets, tmp_path):
    """One evaluation: on some CPUs bitsandbytes rounds scales anew in each.

    There it also wants 64 columns.
    """
    wide = dict(hidden_size=64, intermediate_size=128, head_dim=16)
    model = tiny.save_model(tmp_path / "wide", **wide)
    keys = {**SAVED, **PACKED, **tiny.NF4, "eval_steps": 5, "eval_on_start": False}
    keys = tiny.recipe(tmp_path, model, parts["pairs"], test_datasets=sets, **keys)
    log = tiny.train(tmp_path, keys).state.log_history
    assert_logged(scored(tmp_path), evaluations(log)[5])


# --- the report --------------------------------------------------------------------


def test_the_report_shows_what_lies_in_the_runs_folder(full, tmp_path):
    run = Path(shutil.copytree(full / "out", tmp_path / "out"))
    file = run / "edpo_scores" / "held-out.parquet"
    assert invoke(full, "--output", file).exit_code == 0
    page = page_of(tmp_path / "page", run)
    sets = scored(full)
    assert "Scores: held-out" in page.text("h2")
    assert f"The model of {full / 'out'}, with β = 0.09" in page.text("p")
    assert page.rows()["easy"] == "7" and page.rows()["hard"] == "5"
    assert (tmp_path / "page" / "scores_1_0.png").exists()
    (result,) = numbers(tmp_path, run)
    found = result["scores"]["held-out"]
    assert found["sets"] == sets
    rows = pandas.read_parquet(file)
    assert {pair["id"] for pair in found["pairs"]} == {*rows["id"]}
    rows.to_parquet(run / "edpo_scores" / "mine.parquet")
    assert "mine.parquet: not written by `axolotl edpo-score`" in refused(run)
    pandas.DataFrame({"a": [1]}).to_parquet(run / "edpo_scores" / "mine.parquet")
    assert "mine.parquet: not written by `axolotl edpo-score`" in refused(run)


# --- several ranks -----------------------------------------------------------------


@rest
def test_a_folder_that_ranks_do_not_share_gets_no_file(full, tmp_path, monkeypatch):
    plugins = ["CpuRanks", "FolderOfTheRank"]
    keys = {"plugins": ["axolotl_edpo.EDPOPlugin"], "ddp": True}
    keys["plugins"] += [f"helpers.ranks.{name}" for name in plugins]
    keys["output_dir"] = str(full / "out")
    folder = changed(full, tmp_path / "recipe", **keys)
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("FOLDERS", str(tmp_path))
    words = ("--launcher", "torchrun", "--output", "s.parquet", "--")
    done = subprocess.run(
        ["axolotl", "edpo-score", folder / "recipe.yml", *words]
        + ["--standalone", "--nproc_per_node=2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert " of 12 rows: it must be on a file system that all" in done.stderr
    assert not [*tmp_path.rglob("s.parquet")]


CASES = [(n, r) for n in ("ddp", "zero2", "zero3", "fsdp2") for r in ("full", "lora")]
CASES += [pytest.param("divided", "full packed", marks=needs_divided_rows)]


@rest
@pytest.mark.parametrize(("name", "run"), CASES)
def test_two_ranks_score_as_one_process(trained, tmp_path, monkeypatch, name, run):
    """By way of `--launcher torchrun`; ZeRO-2 shards nothing that an evaluation has.

    `divided`: both ranks get every pair, and its row is written once.
    """
    source, log = trained(run)
    divided = name == "divided"
    keys = {"context_parallel_size": 2} if divided else engine(tmp_path, name)
    keys["output_dir"] = str(source / "out")
    keys["plugins"] = ["axolotl_edpo.EDPOPlugin", "helpers.ranks.CpuRanks"]
    folder = changed(source, tmp_path / "recipe", **keys)
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    file = tmp_path / "two.parquet"
    words = ("--launcher", "torchrun", "--output", file, "--")
    result = invoke(folder, *words, "--standalone", "--nproc_per_node=2")
    assert result.exit_code == 0
    summary = json.loads(pq.read_schema(file).metadata[SCORES.encode()])
    assert_logged(summary["sets"], evaluations(log)[5])
    one = tmp_path / "one.parquet"
    assert invoke(source, "--output", one).exit_code == 0
    several, alone = (
        pandas.read_parquet(path).sort_values("id", ignore_index=True)
        for path in (file, one)
    )
    pandas.testing.assert_frame_equal(several, alone, rtol=1e-5, atol=1e-6)
