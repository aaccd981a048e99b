"""plugin.py through axolotl's own config loading."""

import subprocess
import sys

import pytest
import tiny
import yaml
from axolotl.cli.config import load_cfg
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations import base
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from conftest import ROOT

from axolotl_edpo.plugin import PLUGIN, TRAINER, EDPOPlugin
from axolotl_edpo.upstream import always_on
from axolotl_edpo.versions import TESTED, check_versions


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
        ({"edpo_prefix_sharing": True}, "`edpo_prefix_sharing: True`"),
    ],
)
def test_a_wrong_recipe_stops_before_a_model_is_loaded(recipe, tmp_path, keys, message):
    keys = {**keys, "base_model": str(tmp_path / "does-not-exist")}
    with pytest.raises(ValueError, match=message):
        load(tmp_path, recipe(**keys))


def test_edpo_without_the_plugin_in_the_recipe_is_an_error_up_to_0_20(recipe, tmp_path):
    load(tmp_path, recipe(plugins=[PLUGIN]))  # registered in this process
    spectrum = ["axolotl.integrations.spectrum.SpectrumPlugin"]
    for plugins in (None, spectrum):
        keys = recipe(plugins=plugins, edpo_epsilon=None)
        if PLUGIN in always_on():
            assert load(tmp_path, keys).trainer_cls == TRAINER
            continue
        with pytest.raises(ValueError, match="edpo"):
            load(tmp_path, keys)


@pytest.mark.parametrize("name", ["axolotl", "trl"])
def test_a_release_outside_the_tested_range_names_both_versions(name):
    with pytest.raises(RuntimeError, match=rf"{name} >=9,<10, here it is \d") as caught:
        check_versions({name: ">=9,<10"})
    assert not isinstance(caught.value, ImportError)  # axolotl swallows those
    assert "axolotl-edpo 0." in str(caught.value)


def test_a_missing_dependency_is_named():
    with pytest.raises(RuntimeError, match="nothing-like-it.*here it is not installed"):
        check_versions({"nothing-like-it": ">=1"})


def test_another_trl_stops_the_run_and_never_ends_in_plain_dpo(recipe, tmp_path):
    """A real process that finds the metadata of another TRL first."""
    info = tmp_path / "site" / "trl-1.16.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\n"
    )
    path = tiny.write(tmp_path, recipe())
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "site"), str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 1
    assert f"works with trl {TESTED['trl']}, here it is 1.16.0" in run.stderr


LOAD = """
import sys
import axolotl.cli.config, trl
sys.path.insert(0, sys.argv[1])
axolotl.cli.config.load_cfg(sys.argv[2])
"""


def test_plain_dpo_is_untouched_in_a_process_that_trained_edpo(recipe, tmp_path):
    tiny.train(tmp_path, recipe(max_steps=1))
    assert PLUGIN in PluginManager.get_instance().plugins
    spectrum = ["axolotl.integrations.spectrum.SpectrumPlugin"]
    keys = dict(rl="dpo", rl_beta=0.1, beta=None, edpo_epsilon=None, max_steps=1)
    for plugins in (None, spectrum):
        cfg = load(tmp_path, recipe(**keys, plugins=plugins))
        own = [key for key in cfg if key.startswith("edpo_") or key == "beta"]
        # 0.20 tells a plugin of no recipe without it; its keys stay, without effect
        assert not own or set(base.BUILTIN_PLUGINS) and PLUGIN not in always_on()
        assert (cfg.rl, cfg.trainer_cls) == ("dpo", None)
    trainer = tiny.train(tmp_path, recipe(**keys, plugins=None))
    assert type(trainer) is AxolotlDPOTrainer
    assert tiny.logs(trainer, "loss")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not tiny.logs(trainer, "kl/beta")


def test_the_plugin_imports_nothing_heavy():
    """And importing the package leaves axolotl's training arguments unmerged."""
    code = (
        "import sys, axolotl_edpo; "
        "bad = {'trl', 'axolotl.core.training_args', 'axolotl_edpo.trainer'}; "
        "print(sorted(bad & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_the_lowered_recipe_is_plain_yaml(recipe):
    lowered = DictDefault(recipe())
    EDPOPlugin().register(lowered)
    assert yaml.safe_load(yaml.safe_dump(lowered.to_dict()))["trainer_cls"] == TRAINER
