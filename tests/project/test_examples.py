"""Every recipe in examples/: loaded by axolotl as it stands, trained on tiny parts.

Before axolotl 0.21 a recipe gets the line `plugins:` that its comment asks for.

Model, data, batch sizes and folders are swapped, and no checkpoint is written. Beyond
that a swap is made only where the recipe asks for what this machine may lack:
FlashAttention runs as `sdpa`, and engines are taken out where there is one process with
nothing to shard; those of the cluster recipes run on two ranks. bf16 stays, on CPU too,
except in the supervised recipe, which has no plugin of ours to allow it.
"""

import gzip
import json
import math
import os
import re
import textwrap

import pytest
import yaml
from helpers import ranks, tiny
from helpers.examples import ENGINE, header, read, save_parts, shrunk
from helpers.paths import ROOT
from helpers.tiers import rest
from transformers import AutoTokenizer

from axolotl_edpo.trainer import EDPOTrainer

EXAMPLES = ROOT / "examples"
SWEEPS = sorted(EXAMPLES.glob("sweep*.yml"))
RECIPES = sorted(set(EXAMPLES.glob("*.yml")) - set(SWEEPS))


def selected(paths, **wanted):
    """Parameters for the recipes whose keys have these values; True: any value."""
    return [
        pytest.param(path, id=path.stem)
        for path in paths
        if all(
            read(path).get(key) == value or (value is True and read(path).get(key))
            for key, value in wanted.items()
        )
    ]


@pytest.fixture(autouse=True)
def as_started_from_the_repository(monkeypatch):
    """Paths in recipes are relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def shrink(parts, tmp_path):
    """Swaps in what makes a recipe tiny."""
    return lambda recipe: shrunk(recipe, parts, tmp_path)


def losses(trainer) -> list[float]:
    """Of the optimizer steps, which must be two."""
    logged = tiny.logs(trainer, "loss")
    assert [entry["step"] for entry in logged] == [1, 2]
    return [entry["loss"] for entry in logged]


@pytest.mark.parametrize("path", selected(RECIPES, rl="edpo"))
def test_recipe_trains_two_steps_of_edpo(path, shrink, tmp_path):
    recipe = read(path)
    trainer = tiny.train(tmp_path, shrink(recipe))
    assert type(trainer) is EDPOTrainer
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert trainer.controller.settings.epsilon == recipe["edpo_epsilon"]
    first = tiny.logs(trainer)[0]
    assert first["step"] == 1
    assert first["kl/beta"] == recipe["beta"]
    # policy and reference are still the same: no pair may move, in bf16 and NF4 too
    for name in ("avg_steps", "p_epsilon_steps", "n_epsilon_steps"):
        assert first[f"kl/{name}"] == 0.0


@pytest.mark.parametrize(
    "path",
    selected(RECIPES, rl="edpo", deepspeed=True) + selected(RECIPES, fsdp_version=2),
)
@rest
def test_recipe_of_a_cluster_trains_on_two_ranks(path, shrink, tmp_path):
    recipe = read(path)
    engine = {key: recipe[key] for key in ENGINE if key in recipe}
    if "deepspeed" in engine:
        engine["deepspeed"] = str(ROOT / engine["deepspeed"])
    if "context_parallel_size" in engine:
        engine |= dict(context_parallel_size=2, dp_shard_size=1)
    first, second = ranks.run(tmp_path, {**shrink(recipe), **engine})
    assert first["beta"] == second["beta"]
    steps = [entry for entry in first["log"] if "loss" in entry]
    assert len(steps) == 2 and all(math.isfinite(e["loss"]) for e in steps)
    assert steps[0]["kl/policy_ref"] == steps[0]["kl/p_epsilon_steps"] == 0.0


def test_recipes_of_llama_3_differ_in_their_engine_only():
    first, other = (
        read(EXAMPLES / f"llama3{name}_edpo.yml") for name in ("", "_zero3")
    )
    different = {key for key in first | other if first.get(key) != other.get(key)}
    assert different <= {*ENGINE, "output_dir"}


@pytest.mark.parametrize("path", selected(RECIPES, rl=None))
def test_supervised_recipe_trains_two_steps(path, shrink, tmp_path):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    keys = {**shrink(read(path)), "bf16": False}
    cfg = load_cfg(str(tiny.write(tmp_path, keys)))
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    row = meta.train_dataset[0]
    trainer = train(cfg=cfg, dataset_meta=meta)[2]
    assert all(math.isfinite(loss) for loss in losses(trainer))
    # the answer and the end of its turn are learned, the question is not
    learned = [label for label in row["labels"] if label != -100]
    text = trainer.processing_class.decode(learned)
    assert text.rstrip().endswith("<end_of_turn>")
    assert 1 < len(learned) < len(row["labels"])
    assert "<start_of_turn>" not in text
    saved = AutoTokenizer.from_pretrained(cfg.output_dir)
    assert saved.eos_token == "<end_of_turn>"  # for the stage that starts from here


def test_every_recipe_is_trained_by_a_test_above():
    covered = selected(RECIPES, rl="edpo") + selected(RECIPES, rl=None)
    assert sorted(path for param in covered for path in param.values) == RECIPES


@pytest.mark.parametrize("path", selected(RECIPES, deepspeed=True))
def test_deepspeed_file_of_a_recipe_is_read_by_axolotl(path, shrink):
    """The steps of `load_cfg` up to the one that starts DeepSpeed itself."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    raw = read(path)
    cfg = DictDefault({**raw, "base_model": shrink(raw)["base_model"]})
    prepare_plugins(cfg)
    cfg = validate_config(cfg)
    normalize_config(cfg)
    stage = cfg.deepspeed["zero_optimization"]["stage"]
    assert stage == (3 if "zero3" in path.stem else 2)
    assert cfg.deepspeed["bf16"]["enabled"] is raw["bf16"] is True


@pytest.mark.parametrize("path", selected(RECIPES, bf16=True))
def test_recipe_for_all_weights_in_bf16_keeps_a_32_bit_copy(path):
    """AdamW at 1e-6 moves no bf16 weight; DeepSpeed moves a 32-bit copy, FSDP2 none."""
    recipe = read(path)
    assert ("deepspeed" in recipe) != ("adapter" in recipe)


@pytest.mark.parametrize("path", RECIPES + SWEEPS, ids=lambda path: path.stem)
def test_recipe_opens_with_purpose_hardware_and_start(path):
    assert path.read_text().startswith("# ")
    text = header(path)
    assert re.search(r"^Hardware: .*(GPU|CPU|recipe)", text, re.MULTILINE)
    assert re.search(rf"^    axolotl train .*examples/{path.name}", text, re.MULTILINE)


@pytest.mark.parametrize("path", selected(RECIPES, bf16=True))
def test_recipe_has_128_pairs_a_step_on_the_hardware_it_names(path):
    recipe = read(path)
    gpus = int(re.search(r"^Hardware: (\d+) GPU", header(path), re.MULTILINE)[1])
    gpus //= recipe.get("context_parallel_size", 1)
    cut = [recipe["micro_batch_size"], recipe["gradient_accumulation_steps"], gpus]
    assert math.prod(cut) == 128
    assert " x ".join(map(str, cut)) in path.read_text()


@pytest.mark.parametrize("path", selected(RECIPES, rl="edpo"))
def test_recipe_says_which_line_an_older_axolotl_needs(path):
    """`make demo` runs on Python 3.11 too, whose axolotl needs it."""
    written = yaml.safe_load(path.read_text())
    assert ("plugins" in written) == (path.stem == "tiny_edpo")
    assert "plugins: [axolotl_edpo.EDPOPlugin]" in path.read_text()


@pytest.mark.parametrize("path", selected(RECIPES, saves_per_epoch=True))
def test_recipe_saves_more_than_once_so_that_a_killed_run_can_resume(path):
    recipe = read(path)
    assert recipe["saves_per_epoch"] * recipe["num_epochs"] > 1
    assert recipe["save_total_limit"] == 2 and "save_only_model" not in recipe


def test_sweep_reaches_learning_rate_and_beta(shrink, tmp_path):
    from axolotl.cli.config import load_cfg
    from axolotl.cli.utils.train import generate_config_files

    base = tiny.write(tmp_path, shrink(read(EXAMPLES / "llama3_edpo.yml")))
    seen = set()
    for file, is_group in generate_config_files(
        str(base), str(EXAMPLES / "sweep_edpo.yml")
    ):
        cfg = load_cfg(file)
        os.unlink(file)
        assert is_group and cfg.trainer_cls == "axolotl_edpo.trainer.EDPOTrainer"
        assert cfg.precompute_ref_log_probs is True
        seen.add((cfg.learning_rate, cfg.rl_beta))
    rates, betas = (3e-7, 5e-7, 7e-7, 1e-6), (0.01, 0.03, 0.1)
    assert seen == {(rate, beta) for rate in rates for beta in betas}


TALK = "\n\nHuman: Hello\n\nAssistant: Hi: what\n\nis it?\n\nHuman: Red?\n\nAssistant: "
RAW = [
    (TALK + "Yes.", TALK + "No."),
    (TALK + "Yes.", TALK.replace("Hi", "Ho") + "No."),  # differs before the end
    (TALK + "Yes.", TALK.rstrip()),  # an empty answer
    ("\n\nHuman: A" + TALK + "Yes.", "\n\nHuman: A" + TALK + "No."),  # two questions
]


def test_lines_that_make_the_hh_files_keep_the_rows_that_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for part in ("helpful-base", "harmless-base"):
        for split in ("train", "test"):
            file = tmp_path / "Anthropic/hh-rlhf" / part / f"{split}.jsonl.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(file, "wt") as out:
                for chosen, rejected in RAW:
                    print(json.dumps(dict(chosen=chosen, rejected=rejected)), file=out)
    lines = re.search(
        r"^    import re\n(?:(?:    .*)?\n)*",
        header(EXAMPLES / "gemma2_hh_sft.yml"),
        re.MULTILINE,
    )[0]
    exec(compile(textwrap.dedent(lines), "make_hh.py", "exec"), {})
    asked = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi: what\n\nis it?"},
        {"role": "user", "content": "Red?"},
    ]
    for recipe in ("gemma2_hh_sft.yml", "gemma2_hh_edpo.yml"):
        for entry in read(EXAMPLES / recipe)["datasets"]:
            rows = [json.loads(line) for line in open(entry["path"])]
            assert rows == [
                {
                    "chosen": [*asked, {"role": "assistant", "content": "Yes."}],
                    "rejected": [*asked, {"role": "assistant", "content": "No."}],
                }
            ]
