"""The commands of axolotl on README.md and docs/ run as they are written there.

CI runs those of `make`, and installs the package (`.ci/run`, `.ci/wheel`).
"""

import shutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from helpers import docs_tables, tiny
from helpers.commands import forked
from helpers.pages import commands
from helpers.paths import ROOT
from helpers.tiers import rest
from huggingface_hub import constants

pytestmark = rest

# `make demo` trains it, for minutes.
ELSEWHERE = [["train", "examples/tiny_edpo.yml"]]
# Command -> what it prints.
PRINTED = {
    "edpo-inspect": "sequence  ",
    "edpo-memory": "GiB",
    "edpo-report": "index.html",
    "edpo-schema": "edpo.schema.json",
    "edpo-score": "accuracy",
    "train": "Training completed!",
}


def lines() -> list[list[str]]:
    """What follows `axolotl` on the pages, each once."""
    said = [words[1:] for _, words in commands() if words[0] == "axolotl"]
    once = [line for i, line in enumerate(said) if line not in said[:i]]
    return [line for line in once if line not in ELSEWHERE]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory) -> Path:
    """A folder with a recipe, its run, copies of that, and the examples."""
    folder = tmp_path_factory.mktemp("user")
    keys = dict(max_steps=4, save_strategy="steps", save_steps=2, sample_packing=True)
    keys |= dict(output_dir="model-out", test_datasets=tiny.dataset(parts["eval"]))
    tiny.write(folder, tiny.recipe(folder, parts["model"], parts["pairs"], **keys))
    done = forked(folder, "train", "recipe.yml", "--launcher", "python")
    assert done.returncode == 0, done.stdout[-2000:]
    run = folder / "model-out"
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-470")
    for copy in "abc":
        shutil.copytree(run, folder / "runs" / copy)
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.fixture(scope="module", autouse=True)
def configs_of_the_examples() -> Iterator[None]:
    """Meanwhile the hub's cache holds the config of each model of examples/.

    It holds no weights. Other tests see a cache without these models.
    """
    made = set()  # two recipes may train one model
    for recipe, example in docs_tables.RECIPES.items():
        keys = yaml.safe_load((ROOT / "examples" / f"{recipe}.yml").read_text())
        place = "models--" + keys["base_model"].replace("/", "--")
        made.add(cached := Path(constants.HF_HUB_CACHE) / place)
        docs_tables.CONFIGS[example.model].save_pretrained(cached / "snapshots" / "1")
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text("1")
    yield
    for cached in made:
        shutil.rmtree(cached)


@pytest.mark.parametrize("words", lines(), ids=" ".join)
def test_a_command_of_axolotl_runs_as_written(folder, words):
    done = forked(folder, *words)
    assert done.returncode == 0, done.stdout[-2000:]
    assert PRINTED[words[0]] in done.stdout
    if "--output" in words:
        assert (folder / words[words.index("--output") + 1]).stat().st_size > 0


def test_the_commands_of_this_package_are_all_on_a_page():
    ours = {entry.name for entry in entry_points(group="axolotl.cli_commands")}
    assert {line[0] for line in lines()} == {*PRINTED} == ours | {"train"}
