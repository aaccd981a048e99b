"""plugin.py through axolotl's own config loading."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.main import cli
from axolotl.common.datasets import load_preference_datasets
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations import base
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from helpers import processes, tiny
from helpers.paths import ROOT
from helpers.releases import needs_divided_rows
from torch.multiprocessing import ProcessRaisedException

from axolotl_edpo.config.typos import check_command_line
from axolotl_edpo.config.versions import TESTED, check_versions
from axolotl_edpo.plugin import DEFAULT_SEED, PLUGIN, TRAINER, EDPOPlugin
from axolotl_edpo.upstream import automatic_plugins

BY_ITSELF = PLUGIN in automatic_plugins()  # from axolotl 0.21 on


def load(folder, recipe, **overrides):
    return load_cfg(str(tiny.write(folder, recipe)), **overrides)


def test_the_recipe_is_lowered_to_what_axolotl_knows(recipe, tmp_path):
    cfg = load(tmp_path, recipe())
    assert (cfg.rl, cfg.trainer_cls) == ("dpo", TRAINER)
    assert (cfg.beta, cfg.rl_beta) == (0.1, 0.1)
    assert (cfg.edpo_epsilon, cfg.edpo_beta_mean) == (0.05, "arithmetic")


def test_defaults_are_filled_in(recipe, tmp_path):
    cfg = load(tmp_path, recipe(beta=None, edpo_epsilon=None))
    assert cfg.edpo_epsilon == 0.01
    assert cfg.rl_beta is None  # TRL's default, 0.1
    trainer = tiny.train(tmp_path, recipe(beta=None, edpo_epsilon=None, max_steps=1))
    assert trainer.controller.settings.beta == 0.1
    assert trainer.controller.settings.epsilon == 0.01


def test_packing_is_lowered_to_keys_that_axolotl_lets_be(recipe, tmp_path):
    cfg = load(tmp_path, recipe(sample_packing=True, eval_sample_packing=False))
    assert (cfg.sample_packing, cfg.eval_sample_packing) == (None, None)
    assert (cfg.edpo_sample_packing, cfg.edpo_eval_sample_packing) == (True, False)
    assert cfg.edpo_prefix_sharing == "auto"
    cfg = load(tmp_path, recipe(sample_packing="auto", edpo_prefix_sharing=False))
    assert (cfg.edpo_sample_packing, cfg.edpo_prefix_sharing) == ("auto", False)
    assert not load(tmp_path, recipe()).edpo_sample_packing
    empty = recipe(sample_packing=True) | {"edpo_prefix_sharing": None}  # `key:` alone
    assert load(tmp_path, empty).edpo_prefix_sharing == "auto"


@pytest.mark.parametrize("keys", [{}, {"sample_packing": True}], ids=str)
def test_lowering_a_lowered_recipe_changes_nothing(recipe, tmp_path, keys):
    once = DictDefault(recipe(**keys))
    EDPOPlugin().register(once)
    twice = DictDefault(once.to_dict())
    EDPOPlugin().register(twice)
    assert once.to_dict() == twice.to_dict()
    # and what a Ray worker does with the validated config
    cfg = load(tmp_path, recipe(**keys))
    again = DictDefault(cfg.to_dict())
    EDPOPlugin().register(again)
    assert again.to_dict() == cfg.to_dict()


def test_a_command_line_beta_that_disagrees_names_both(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"`beta: 0.1` and `rl_beta: 0.2`"):
        load(tmp_path, recipe(), rl_beta=0.2)
    with pytest.raises(ValueError, match=r"`beta: 0.1` and `trl.beta: 0.3`"):
        load(tmp_path, recipe(), trl__beta=0.3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"edpo_epsilonn": 0.1}, "did you mean `edpo_epsilon`"),
        ({"edpo_epsilon": 2}, "`edpo_epsilon: 2`"),
        ({"rl": "dpo"}, "`edpo_epsilon: 0.05` has no effect with `rl: dpo`"),
        ({"rl": None}, "`edpo_epsilon: 0.05` has no effect"),
        ({"trainer_cls": "my.Trainer"}, "`trainer_cls: my.Trainer`.*remove it"),
        ({"edpo_prefix_sharing": True}, "`edpo_prefix_sharing: true`"),
    ],
)
def test_a_wrong_recipe_stops_before_a_model_is_loaded(recipe, tmp_path, keys, message):
    keys = {**keys, "base_model": str(tmp_path / "does-not-exist")}
    with pytest.raises(ValueError, match=message):
        load(tmp_path, recipe(**keys))


SPECTRUM = "axolotl.integrations.spectrum.SpectrumPlugin"


@pytest.mark.parametrize("plugins", [None, [SPECTRUM]], ids=["none", "another"])
def test_one_word_is_enough_from_axolotl_021_on(recipe, tmp_path, plugins):
    load(tmp_path, recipe(plugins=[PLUGIN]))  # registered in this process
    keys = recipe(plugins=plugins, edpo_epsilon=None)
    if BY_ITSELF:
        cfg = load(tmp_path, keys)
        assert (cfg.rl, cfg.trainer_cls, cfg.edpo_epsilon) == ("dpo", TRAINER, 0.01)
        return
    with pytest.raises(ValueError, match="edpo"):
        load(tmp_path, keys)
    # 0.19 asks a plugin that another recipe of the process named; 0.20 does not
    with pytest.raises(ValueError, match=rf"`plugins: \[{PLUGIN}\]`.*only from 0.21"):
        EDPOPlugin().register(DictDefault(keys))


def test_the_form_of_an_entry_point_names_the_plugin_too(recipe, tmp_path):
    """`module:Class`, which axolotl takes from 0.21 on."""
    colon = DictDefault(recipe(plugins=["axolotl_edpo:EDPOPlugin"]))
    EDPOPlugin().register(colon)
    assert colon.trainer_cls == TRAINER
    if BY_ITSELF:
        cfg = load(tmp_path, recipe(plugins=["axolotl_edpo:EDPOPlugin"]))
        assert cfg.trainer_cls == TRAINER


@pytest.mark.parametrize("name", ["axolotl", "trl"])
def test_a_release_outside_the_tested_range_names_both_versions(name):
    with pytest.raises(RuntimeError, match=rf"{name} >=9,<10, here it is \d") as caught:
        check_versions({name: ">=9,<10"})
    assert not isinstance(caught.value, ImportError)  # axolotl swallows those
    assert "axolotl-edpo 0." in str(caught.value)


def test_a_missing_dependency_is_named():
    with pytest.raises(RuntimeError, match="nothing-like-it.*here it is not installed"):
        check_versions({"nothing-like-it": ">=1"})


def load_with_another(name: str, folder: Path, keys: dict) -> str:
    """Loads a recipe in a process that finds the metadata of another release first.

    Returns:
        `plain dpo`, or the trainer that the recipe chose.
    """
    info = folder / "site" / f"{name}-9.9.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.0\n"
    )
    processes.run(load_there, folder, tiny.write(folder, keys))
    return (folder / "loaded").read_text()


def load_there(rank: int, folder: Path, path: Path) -> None:
    """In the process: it imported axolotl and TRL before."""
    sys.path.insert(0, str(folder / "site"))
    cfg = load_cfg(str(path))
    plain = cfg.rl == "dpo" and cfg.trainer_cls is None
    (folder / "loaded").write_text("plain dpo" if plain else cfg.trainer_cls)


@pytest.mark.parametrize("name", ["axolotl", "trl"])
@pytest.mark.parametrize("plugins", [[PLUGIN], None], ids=["named", "by itself"])
def test_another_release_ends_in_our_sentence_and_never_in_plain_dpo(
    recipe, tmp_path, name, plugins
):
    """Before 0.21 a recipe without `plugins:` ends in axolotl's: it knows no `edpo`."""
    with pytest.raises(ProcessRaisedException) as raised:
        load_with_another(name, tmp_path, recipe(plugins=plugins))
    last = str(raised.value).strip().splitlines()[-1]
    sentence = f"works with {name} {TESTED[name]}, here it is 9.9.0"
    assert sentence in last if plugins or BY_ITSELF else "edpo" in str(raised.value)
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("name", ["axolotl", "trl"])
def test_another_release_is_no_matter_of_plain_dpo(recipe, tmp_path, name):
    assert load_with_another(name, tmp_path, recipe(**tiny.DPO)) == "plain dpo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--edpo-epsilon", "0.02"], "`--edpo-epsilon 0.02` .*`edpo_epsilon: 0.02`"),
        (["--edpo_epsilon=0.02"], "`--edpo_epsilon 0.02` .*`edpo_epsilon: 0.02`"),
        (["--beta", "0.02"], "`--beta 0.02` .*`beta: 0.02`"),
    ],
)
def test_an_option_of_ours_on_the_command_line_is_refused(
    recipe, tmp_path, words, message
):
    """axolotl's own command, up to where it loads the recipe."""
    path = tiny.write(tmp_path, recipe(beta=None, edpo_epsilon=None))
    with pytest.raises(ValueError, match=message):
        cli(["train", str(path), "--launcher", "python", *words], standalone_mode=False)


def test_words_for_a_launcher_are_left_alone():
    check_command_line(["--nproc_per_node=2", "--beta", "2"], keys=())
    with pytest.raises(ValueError, match="--edpo-epsilonn"):
        check_command_line(["--nproc_per_node", "2", "--edpo-epsilonn"], keys=())


def test_plain_dpo_is_untouched_in_a_process_that_trained_edpo(recipe, tmp_path):
    tiny.train(tmp_path, recipe(max_steps=1))
    assert PLUGIN in PluginManager.get_instance().plugins
    keys = dict(rl="dpo", rl_beta=0.1, beta=None, edpo_epsilon=None, max_steps=1)
    for plugins in (None, [SPECTRUM]):
        cfg = load(tmp_path, recipe(**keys, plugins=plugins))
        left = [key for key in cfg if key.startswith("edpo_") or key == "beta"]
        # axolotl 0.20 loads a plugin of its own into every recipe, and with it the keys
        # of all plugins of the process; this one is not asked, and they do nothing
        assert not left or set(base.BUILTIN_PLUGINS) and not BY_ITSELF
        assert (cfg.rl, cfg.trainer_cls) == ("dpo", None)
    trainer = tiny.train(tmp_path, recipe(**keys, plugins=None))
    assert type(trainer) is AxolotlDPOTrainer
    assert tiny.logs(trainer, "loss")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not tiny.logs(trainer, "kl/beta")


def test_the_plugin_imports_nothing_heavy_and_nothing_that_draws():
    """And importing the package leaves axolotl's training arguments unmerged."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, axolotl_edpo.plugin; print(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    imported = {*done.stdout.split()}
    assert "axolotl_edpo.plugin" in imported, done.stderr
    heavy = {"trl", "axolotl.core.training_args", "axolotl_edpo.trainer"}
    assert not (heavy | {"matplotlib", "axolotl_edpo.report"}) & imported


@pytest.mark.parametrize(("seed", "used"), [(0, 0), (7, 7), (None, DEFAULT_SEED)])
def test_a_model_is_loaded_with_the_seed_of_the_recipe(recipe, tmp_path, seed, used):
    EDPOPlugin().pre_model_load(load(tmp_path, recipe(seed=seed)))
    assert torch.initial_seed() == used


@needs_divided_rows
def test_one_process_prepares_divided_rows_and_does_not_train_on_them(recipe, tmp_path):
    keys = dict(context_parallel_size=2, sample_packing=True)
    cfg = load(tmp_path, recipe(**keys))
    with pytest.raises(ValueError, match="`context_parallel_size: 2` in a run of one"):
        load_preference_datasets(cfg=cfg)
    cfg.is_preprocess = True  # as `axolotl preprocess` sets it
    assert len(load_preference_datasets(cfg=cfg).train_dataset) > 0


@needs_divided_rows
@pytest.mark.parametrize(
    ("ranks", "config", "message"),
    [
        (3, {}, "`context_parallel_size: 3`.*set a divisor of the 4 heads"),
        (
            2,
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "`context_parallel_size: 2`.*`sequence_len` up to 128: .*longest sequence",
        ),
    ],
)
def test_a_model_whose_rows_ranks_cannot_divide_is_refused(
    recipe, tmp_path, ranks, config, message
):
    """Before it is loaded."""
    rope = {"rope_theta": 10000.0, **config.get("rope_parameters", {})}
    sizes = dict(max_position_embeddings=128, rope_parameters=rope) if config else {}
    model = str(tiny.save_model(tmp_path / "model", **sizes))
    keys = dict(base_model=model, sample_packing=True, context_parallel_size=ranks)
    cfg = load(tmp_path, recipe(**keys))
    cfg.world_size = ranks
    assert cfg.context_parallel is None  # axolotl's own plugin stands aside
    with pytest.raises(ValueError, match=message):
        EDPOPlugin().pre_model_load(cfg)


def test_the_lowered_recipe_is_plain_yaml(recipe):
    lowered = DictDefault(recipe())
    EDPOPlugin().register(lowered)
    assert yaml.safe_load(yaml.safe_dump(lowered.to_dict()))["trainer_cls"] == TRAINER
