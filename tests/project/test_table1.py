"""examples/table1: a recipe per method and model, which differ in the method alone."""

import itertools
import json
import math
import re
import runpy
import shutil

import pytest
import yaml
from helpers import tiny
from helpers.examples import header, read, save_parts, shrunk
from helpers.paths import ROOT
from helpers.tiers import only, rest

from axolotl_edpo.trainer import EDPOTrainer

FOLDER = ROOT / "examples" / "table1"
RECIPES = sorted(FOLDER.glob("*/*.yml"))
MODELS = {"llama3": "llama3_edpo", "mistral": "mistral_edpo"}
METHODS = (
    *("rrhf", "slic_hf", "dpo", "ipo", "cpo", "kto", "orpo", "rdpo", "simpo"),
    *("beta_dpo", "tr_dpo", "edpo"),
)
# Keys in which the recipes of a model may differ.
METHOD_KEYS = {
    *("rl", "dpo_loss_type", "beta", "rl_beta", "trl", "learning_rate", "output_dir"),
    *("cpo_alpha", "orpo_alpha", "simpo_gamma", "edpo_slic_delta"),
    *("kto_desirable_weight", "kto_undesirable_weight", "edpo_length_penalty"),
    *("edpo_epsilon", "edpo_control"),
    *("edpo_margin_weight", "edpo_margin_momentum", "edpo_margin_keep"),
}
# Keys of the data, in which KTO differs.
DATA_KEYS = {"datasets", "sample_packing", "remove_unused_columns"}


def named(path) -> str:
    return f"{path.parent.name}-{path.stem}"


def method_of(path) -> dict:
    """The keys of the method that have numbers, those of `trl:` among them."""
    recipe = yaml.safe_load(path.read_text())
    method = {key: recipe[key] for key in recipe if key in METHOD_KEYS - {"output_dir"}}
    if method["rl"] == "edpo":
        del method["rl"]
    return method | method.pop("trl", {})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def kto_file(parts, tmp_path_factory):
    """What make_kto.py makes of the pairs, by its command line."""
    folder = tmp_path_factory.mktemp("kto")
    (folder / "pairs").mkdir()
    shutil.copy(parts["pairs"], folder / "pairs" / "train.jsonl")
    (entry,) = read(FOLDER / "llama3" / "dpo.yml")["datasets"]
    recipe = {
        "base_model": str(parts["models"]["llama"]),
        "datasets": [{**entry, "path": str(folder / "pairs")}],
    }
    words = [str(tiny.write(folder, recipe)), str(folder / "made" / "kto.jsonl")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_kto.py", *words])
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        runpy.run_path(str(FOLDER / "make_kto.py"), run_name="__main__")
    return folder / "made" / "kto.jsonl"


@pytest.fixture
def shrink(parts, tmp_path):
    """Swaps in what makes a recipe tiny."""

    def swap(recipe: dict, file=None) -> dict:
        small = shrunk(recipe, parts, tmp_path)
        if recipe["rl"] == "kto":
            (entry,) = small["datasets"]
            small["datasets"] = [{**entry, "path": str(file)}]
            small["bf16"] = False  # no plugin of ours allows it on a CPU
        return small

    return swap


def test_each_method_has_a_recipe_for_each_model():
    wanted = {FOLDER / m / f"{n}.yml" for m, n in itertools.product(MODELS, METHODS)}
    assert {*RECIPES} == wanted


@pytest.mark.parametrize("model", MODELS)
def test_recipes_of_a_model_differ_in_the_method_alone(model):
    """And from the recipe of the paper's run in nothing that changes the training."""
    recipes = {name: read(FOLDER / model / f"{name}.yml") for name in METHODS}
    first = recipes["edpo"]
    for name, recipe in recipes.items():
        different = {k for k in first | recipe if first.get(k) != recipe.get(k)}
        allowed = METHOD_KEYS | (DATA_KEYS if name == "kto" else set()) | {"plugins"}
        assert different <= allowed, name
        folder = f"./outputs/table1/{model}-{name.replace('_', '-')}"
        assert recipe["output_dir"] == folder
    paper = read(ROOT / "examples" / f"{MODELS[model]}.yml")
    different = {k for k in first | paper if first.get(k) != paper.get(k)}
    assert different <= {"output_dir", "sample_packing"}


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_has_the_numbers_of_both_recipes(name):
    text = (FOLDER / "README.md").read_text()
    (row,) = re.findall(rf"^\| `{name}\.yml` \|.*$", text, re.MULTILINE)
    keys, rates = (re.findall("`([^`]+)`", cell) for cell in row.split("|")[3:5])
    written = [yaml.safe_load(span) for span in keys]
    found = []
    for model, rate in zip(MODELS, rates, strict=True):
        method = method_of(FOLDER / model / f"{name}.yml")
        assert method.pop("learning_rate") == float(rate)
        found += [{key: value} for key, value in method.items()]
    assert all(key in written for key in found)
    assert all(key in found for key in written)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe_opens_with_purpose_hardware_and_start(path):
    text = header(path)
    assert re.search(r"^Hardware: 8 GPUs", text, re.MULTILINE)
    start = f"    axolotl train {path.relative_to(ROOT)}"
    assert start in text.splitlines()
    recipe = read(path)
    cut = [recipe["micro_batch_size"], recipe["gradient_accumulation_steps"], 8]
    assert math.prod(cut) == 128 and " x ".join(map(str, cut)) in path.read_text()


@pytest.mark.parametrize(
    "path", only(RECIPES, lambda path: path.parent.name == "llama3"), ids=named
)
def test_recipe_loads(path, shrink, parts, tmp_path):
    recipe = read(path)
    cfg = tiny.load_config(tmp_path, shrink(recipe, parts["pairs"]))
    kto = path.stem == "kto"
    assert cfg.rl == ("kto" if kto else "dpo")
    assert (cfg.trainer_cls == "axolotl_edpo.trainer.EDPOTrainer") != kto
    values = {**(cfg.trl or {}), **cfg, "beta": cfg.rl_beta}
    method = method_of(path)
    assert {key: values[key] for key in method} == method


@rest
@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe_trains_two_steps(path, shrink, tmp_path, request):
    file = request.getfixturevalue("kto_file") if path.stem == "kto" else None
    trainer = tiny.train(tmp_path, shrink(read(path), file))
    logged = tiny.logs(trainer, "loss")
    assert [entry["step"] for entry in logged] == [1, 2]
    assert all(math.isfinite(entry["loss"]) for entry in logged)
    if path.stem == "kto":
        assert type(trainer).__name__ == "AxolotlKTOTrainer"
        return
    assert type(trainer) is EDPOTrainer
    method = method_of(path)
    assert [*trainer.loss.types] == method.get("dpo_loss_type", ["sigmoid"])
    assert trainer.loss.length_penalty == method.get("edpo_length_penalty", 0.0)
    control = trainer.controller.settings
    assert control.control == method.get("edpo_control", "epsilon")
    if "beta" in method:
        assert tiny.logs(trainer)[0]["kl/beta"] == pytest.approx(method["beta"])


def test_answers_of_pairs_become_lines_of_kto(kto_file, parts):
    pairs = [json.loads(line) for line in parts["pairs"].open()]
    rows = [json.loads(line) for line in kto_file.open()]
    expected = [
        {
            "prompt": f"[user]{pair['prompt']}</s>[assistant]",
            "completion": f"{pair[column][-1]['content']}</s>",
            "label": column == "chosen",
        }
        for pair in pairs
        for column in ("chosen", "rejected")
    ]
    assert rows == expected
