"""backbone.py: hidden states and heads give the model's own logits."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from axolotl_edpo import backbone
from axolotl_edpo.batch import Completions
from axolotl_edpo.logprobs import _logits

SIZES = {**tiny.SIZES, "vocab_size": 100, "initializer_range": 0.5}
MODELS = {
    "llama": tiny.CONFIGS["llama"](**SIZES),
    "tied": tiny.CONFIGS["llama"](**SIZES, tie_word_embeddings=True),
    "mistral": tiny.CONFIGS["mistral"](**SIZES),
    "gemma2": tiny.CONFIGS["gemma2"](
        **SIZES, final_logit_softcapping=2.0, attn_logit_softcapping=5.0
    ),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
}
IDS = torch.arange(3, 19).view(2, 8)


@pytest.mark.parametrize("kind", MODELS)
def test_head_and_hidden_states_give_the_models_own_logits(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).eval()
    every = Completions(torch.arange(16), IDS.flatten(), torch.tensor([8, 8]))
    with torch.no_grad():
        hidden = backbone.completion_hidden(model, IDS, torch.ones_like(IDS), every)
        ours = _logits(hidden, backbone.head_of(model))
        own = model(IDS).logits.flatten(0, 1)
    assert own.abs().max() > 0.5
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "keys", [{"logits_scaling": 8.0}, {"output_logit_soft_cap": 30.0}]
)
def test_an_unknown_transform_of_the_logits_is_refused_and_not_guessed(keys):
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"](**SIZES, **keys))
    with pytest.raises(ValueError, match=f"type llama has `{next(iter(keys))}`"):
        backbone.head_of(model)


def lora(**keys):
    model = AutoModelForCausalLM.from_config(MODELS["llama"])
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **keys))


def test_a_trained_copy_of_the_head_is_the_policys_and_not_the_references():
    model = lora(modules_to_save=["lm_head"])
    trained = backbone.head_module(backbone.causal_lm(model))
    assert trained.weight.requires_grad
    with backbone.reference_adapter(model):
        original = backbone.head_module(backbone.causal_lm(model))
    assert original is not trained
    assert not original.weight.requires_grad
    assert backbone.head_module(backbone.causal_lm(model)) is trained


def test_a_head_under_lora_is_refused_with_a_way_out():
    model = get_peft_model(
        AutoModelForCausalLM.from_config(MODELS["llama"]),
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    )
    with pytest.raises(ValueError, match="lora_target_modules.*lora_modules_to_save"):
        backbone.head_module(backbone.causal_lm(model))


def test_the_reference_adapter_is_a_bitwise_copy_in_the_same_dtype():
    """Embedding adapters too, which are parameters and no modules."""
    model = get_peft_model(
        AutoModelForCausalLM.from_config(MODELS["llama"]),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter).bfloat16()
    model.add_adapter("ref", model.peft_config["default"])
    backbone.copy_to_reference_adapter(model)
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
        with backbone.reference_adapter(model):
            assert torch.equal(model(IDS).logits, own)
        with model.disable_adapter():
            assert not torch.equal(model(IDS).logits, own)
