"""errors.py: a value in a message is as a user would write it in the recipe."""

import math

import pytest
import yaml

from axolotl_edpo.errors import as_yaml, quote, refuse

WRITTEN = [
    (True, "true"),
    (False, "false"),
    (None, "null"),
    (2, "2"),
    (0.5, "0.5"),
    (math.inf, ".inf"),
    (-math.inf, "-.inf"),
    ("lora", "lora"),
    ([], "[]"),
    (["q_proj", None, 1.5], "[q_proj, null, 1.5]"),
    ({"size": 2, "layers": [True]}, "{size: 2, layers: [true]}"),
    ({}, "{}"),
]


@pytest.mark.parametrize(("value", "text"), WRITTEN, ids=str)
def test_a_value_is_written_as_yaml_reads_it(value, text):
    assert as_yaml(value) == text
    assert yaml.safe_load(text) == value


def test_nan_is_written_as_yaml_reads_it():
    assert as_yaml(math.nan) == ".nan"
    assert math.isnan(yaml.safe_load(".nan"))


def test_a_tuple_is_written_as_the_list_that_it_was():
    assert as_yaml((1, "a")) == "[1, a]"


def test_a_refusal_is_key_value_and_remedy():
    assert quote("fp16", True) == "`fp16: true`"
    line = r"^`fp16: true` does not work with `rl: edpo`: remove it$"
    with pytest.raises(ValueError, match=line):
        refuse("fp16", True, "remove it")
