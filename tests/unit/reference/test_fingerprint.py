"""fingerprint.py: what of a model's own code is in the name of its cache."""

import pytest
from transformers import LlamaConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from axolotl_edpo.reference.fingerprint import remote_code

BASE = """from transformers import LlamaForCausalLM

class BaseForCausalLM(LlamaForCausalLM):
    pass
"""
OWN = """from .modeling_base import BaseForCausalLM

class OwnForCausalLM(BaseForCausalLM):
    pass
"""
SIZES = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
CONFIG = LlamaConfig(**SIZES, num_attention_heads=1)


@pytest.fixture
def own(tmp_path):
    """A class in code that is shipped with weights; its base is in another file."""
    (tmp_path / "modeling_base.py").write_text(BASE)
    (tmp_path / "modeling_own.py").write_text(OWN)
    return get_class_from_dynamic_module("modeling_own.OwnForCausalLM", tmp_path)


def test_the_code_of_a_model_is_every_file_that_defines_a_class_of_it(own):
    assert remote_code(own(CONFIG)) == [OWN, BASE]


def test_the_code_of_a_sharded_model_is_that_of_the_model(own):
    """FSDP2 gives a model a class of its own, below the model's."""
    sharded = type("FSDPOwnForCausalLM", (own,), {})
    assert remote_code(sharded(CONFIG)) == [OWN, BASE]
