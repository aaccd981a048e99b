"""axolotl's own commands take the recipe: the whole life of an adapter."""

import json
import shutil

import pytest
from helpers import tiny
from helpers.commands import Done, forked, installed
from safetensors.torch import load_file


def assert_done(run: Done) -> str:
    """The command succeeded; returns what it printed."""
    assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    recipe = tiny.recipe(
        folder,
        tiny.save_model(folder / "model"),
        tiny.save_pairs(folder / "pairs.jsonl", 16),
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_linear=True,
        # axolotl switches its CUDA kernels on for inference, where `rl` is gone
        lora_mlp_kernel=False,
        lora_qkv_kernel=False,
        lora_o_kernel=False,
        val_set_size=0.25,
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    tiny.write(folder, recipe)
    return folder


@pytest.mark.parametrize(
    "axolotl", [forked, pytest.param(installed, marks=pytest.mark.rest)]
)
def test_preprocess_train_evaluate_merge_and_inference_take_the_recipe(folder, axolotl):
    """The default launcher, of accelerate, is left to the installed commands.

    Over 20 s: `train` is the installed command, whose process imports everything.
    """
    python = ("--launcher", "python")
    assert_done(axolotl(folder, "preprocess", "recipe.yml"))
    assert list((folder / "prepared").glob("*/*.arrow"))

    shutil.rmtree(folder / "out", ignore_errors=True)
    launcher = () if axolotl is installed else python
    printed = assert_done(installed(folder, "train", "recipe.yml", *launcher))
    state = folder / "out" / "checkpoint-3" / "trainer_state.json"
    state = json.loads(state.read_text())
    assert state["stateful_callbacks"]["EDPO"]["beta"] != 0.1
    logged = [row["kl/beta"] for row in state["log_history"] if "kl/beta" in row]
    assert logged[0] == 0.1
    assert "'kl/policy_ref'" in printed  # in the console, not in the file alone

    words = ("--lora-model-dir", "out", *python)
    assert_done(axolotl(folder, "evaluate", "recipe.yml", *words))
    table = (folder / "out" / "eval_summary.csv").read_text()
    row = next(line for line in table.splitlines() if line.startswith("kl/policy_ref"))
    assert float(row.split(",")[2]) > 0  # the adapter against the model below it

    assert_done(axolotl(folder, "merge-lora", "recipe.yml"))
    merged = load_file(folder / "out" / "merged" / "model.safetensors")
    assert merged.keys() == load_file(folder / "model" / "model.safetensors").keys()

    answer = axolotl(folder, "inference", "recipe.yml", *words, stdin="a red cat")
    assert "Give me an instruction" in assert_done(answer)


def test_a_wrong_recipe_fails_with_one_clear_line(folder):
    recipe = (folder / "recipe.yml").read_text()
    bad = folder / "bad.yml"
    bad.write_text(recipe.replace("edpo_epsilon: 0.05", "edpo_epsilonn: 0.05"))
    done = forked(folder, "train", "bad.yml", "--launcher", "python")
    message = (
        "ValueError: `edpo_epsilonn: 0.05` is not an option of `rl: edpo`: "
        "did you mean `edpo_epsilon`?"
    )
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == message
