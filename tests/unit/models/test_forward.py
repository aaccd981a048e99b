"""forward.py: hidden states, logits and adapters of policy and reference."""

import pytest
import torch
from helpers import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from axolotl_edpo.data.completions import Completions
from axolotl_edpo.models.forward import (
    completion_logits,
    copy_embeddings,
    copy_to_reference_adapter,
    reference_adapter,
)

LLAMA = AutoConfig.for_model(
    "llama", **{**tiny.SIZES, "vocab_size": 100, "initializer_range": 0.5}
)
IDS = torch.arange(3, 19).view(2, 8)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def build():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA)


@pytest.mark.parametrize("moved", [["head"], ["words"], ["words", "head"]])
def test_a_reference_takes_the_policys_embeddings_where_they_differ(moved):
    policy, reference = build(), build()
    assert not copy_embeddings(policy, reference)
    own, copied = (
        {"words": lm.model.embed_tokens.weight, "head": lm.lm_head.weight}
        for lm in (policy, reference)
    )
    with torch.no_grad():
        for name in moved:
            own[name][3] += 1
    assert copy_embeddings(policy, reference)
    for name in own:
        assert torch.equal(own[name], copied[name]), name
    assert not copy_embeddings(policy, reference)


class MakesAll(LlamaForCausalLM):
    """Takes `logits_to_keep` among other things, and makes all logits."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        kwargs.pop("logits_to_keep", None)
        return super().forward(input_ids, attention_mask, **kwargs)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, MakesAll])
def test_logits_are_made_at_the_positions_that_are_asked_for(kind):
    model = kind(LLAMA)
    some = Completions(
        torch.tensor([1, 3, 11]), IDS.flatten()[:3], torch.tensor([2, 1])
    )
    with torch.no_grad():
        few = completion_logits(model, INPUTS, some)
        torch.testing.assert_close(few, model(IDS).logits.flatten(0, 1)[[1, 3, 11]])


def test_the_reference_adapter_is_a_bitwise_copy_in_the_same_dtype():
    """Embedding adapters too, which are parameters and no modules."""
    model = get_peft_model(
        AutoModelForCausalLM.from_config(LLAMA),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter).bfloat16()
    model.add_adapter("ref", model.peft_config["default"])
    copy_to_reference_adapter(model)
    named = dict(model.named_parameters())
    copies = [name for name in named if "ref" in name.split(".")]
    assert len(copies) == 2 * 2 + 2
    for name in copies:
        source = named[name.replace("ref", "default")]
        assert named[name].dtype == torch.bfloat16
        assert torch.equal(named[name], source)
        assert named[name].data_ptr() != source.data_ptr()
    with torch.no_grad():
        own = model(IDS).logits
        with reference_adapter(model):
            assert torch.equal(model(IDS).logits, own)
        with model.disable_adapter():
            assert not torch.equal(model(IDS).logits, own)
