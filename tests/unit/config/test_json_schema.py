"""json_schema.py: editors complete and mark what axolotl and the plugin take."""

import importlib
import json
import tomllib

import click
import pytest
import yaml
from axolotl.cli.main import cli
from axolotl.utils.schemas.config import AxolotlInputConfig
from click.testing import CliRunner
from helpers.paths import ROOT
from jsonschema.validators import Draft202012Validator

from axolotl_edpo.config.args import EDPOArgs
from axolotl_edpo.config.json_schema import edpo_schema, recipe_schema

EXAMPLES = ROOT / "examples"
RECIPES = [
    path
    for path in (*EXAMPLES.glob("*.yml"), *EXAMPLES.glob("table1/*/*.yml"))
    if "sweep" not in path.stem
]
GROUP = "axolotl.cli_commands"


@pytest.fixture(scope="module")
def schema():
    made = recipe_schema()
    Draft202012Validator.check_schema(made)
    return made


@pytest.fixture(scope="module")
def base():
    return yaml.safe_load((EXAMPLES / "tiny_edpo.yml").read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_every_example_is_valid(schema, path):
    Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "keys",
    [
        {"rl": "dpo"},
        {"sample_packing": "auto", "eval_sample_packing": False},
        {"edpo_prefix_sharing": "auto", "edpo_beta_mean": "harmonic"},
        {"qat": {"weight_dtype": "int4", "activation_dtype": "fp8"}},
    ],
    ids=str,
)
def test_what_the_plugin_takes_is_valid(schema, base, keys):
    Draft202012Validator(schema).validate(base | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"edpo_epsilon": 1.5},
        {"edpo_epsilon": 0},
        {"edpo_epsilonn": 0.1},
        {"beta": 0},
        {"rl": "edpoo"},
        {"edpo_beta_mean": "geometric"},
        {"sample_packing": "yes"},
        {"eval_sample_packing": "auto"},
        {"lora_r": "many"},
    ],
    ids=str,
)
def test_what_is_wrong_is_one_error_at_its_key(schema, base, keys):
    (error,) = Draft202012Validator(schema).iter_errors(base | keys)
    assert list(error.path) in ([], list(keys))
    assert str(*keys.values()) in error.message


def test_every_option_is_there_and_nothing_of_axolotl_is_lost(schema):
    properties = schema["properties"]
    axolotl = {f.alias or n: f for n, f in AxolotlInputConfig.model_fields.items()}
    assert properties.keys() == axolotl.keys() | EDPOArgs.model_fields.keys()
    for name, option in EDPOArgs.model_fields.items():
        assert properties[name]["description"] == option.description
        assert properties[name]["default"] == option.default
    for name, field in axolotl.items():
        described = field.json_schema_extra or {}
        assert described.items() <= properties[name].items(), name


def test_an_entry_point_is_a_command_of_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = project["entry-points"][GROUP]
    names = ["inspect", "memory", "report", "schema", "score"]
    assert sorted(targets) == [f"edpo-{name}" for name in names]
    for name, target in targets.items():
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        assert command.name == name


def test_the_command_prints_the_schema(schema):
    result = CliRunner().invoke(edpo_schema, [])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == schema


def test_axolotl_finds_the_command_and_it_writes_a_file(schema, tmp_path):
    """Needs the package installed with its entry point."""
    made = tmp_path / "made.json"
    command = cli.get_command(click.Context(cli), "edpo-schema")
    result = CliRunner().invoke(command, [str(made)])
    assert result.exit_code == 0, result.output
    assert json.loads(made.read_text()) == schema
