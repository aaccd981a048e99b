"""lm_head_reader.py: the head and hidden states give the model's own logits."""

import pytest
import torch
from helpers import tiny
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaForCausalLM,
    PhiConfig,
)

from axolotl_edpo.data.completions import Completions
from axolotl_edpo.models.forward import (
    causal_lm,
    completion_hidden,
    copy_to_reference_adapter,
    evaluating,
    reference_adapter,
)
from axolotl_edpo.models.lm_head_reader import (
    HeadError,
    check_head,
    head_modules,
    head_of,
    shared_reference_head,
)
from axolotl_edpo.ops.token_stats import token_stats

SIZES = {**tiny.SIZES, "vocab_size": 100, "initializer_range": 0.5}
MODELS = {
    "llama": AutoConfig.for_model("llama", **SIZES),
    "tied": AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True),
    "mistral": AutoConfig.for_model("mistral", **SIZES),
    "gemma2": AutoConfig.for_model(
        "gemma2", **SIZES, final_logit_softcapping=2.0, attn_logit_softcapping=5.0
    ),
    "gemma3": Gemma3TextConfig(**SIZES, final_logit_softcapping=2.0),
    "biased": PhiConfig(**SIZES),
    "falcon_h1": FalconH1Config(
        **SIZES, lm_head_multiplier=0.25, mamba_d_ssm=32, mamba_n_heads=4
    ),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
}
IDS = torch.arange(3, 19).view(2, 8)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
EVERY = Completions(torch.arange(16), IDS.flatten(), torch.tensor([8, 8]))


def both_logits(model):
    """What the head that was read makes, and what the model makes itself."""
    lm = causal_lm(model)
    with evaluating(model):
        hidden = completion_hidden(lm, INPUTS, EVERY)
        return head_of(lm).logits(hidden), model(IDS).logits.flatten(0, 1)


def assert_same_logits(model, rtol=1e-5):
    ours, own = both_logits(model)
    assert own.abs().max() > 0.4
    torch.testing.assert_close(ours, own.float(), rtol=0, atol=rtol * own.abs().max())


def build(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[kind])


@pytest.mark.parametrize("kind", MODELS)
def test_head_and_hidden_states_give_the_models_own_logits(kind):
    model = build(kind)
    bias = model.get_output_embeddings().bias
    assert (bias is not None) == (kind == "biased")
    if bias is not None:
        torch.nn.init.normal_(bias)
    assert_same_logits(model)
    check_head(model)


@pytest.mark.parametrize(
    ("keys", "rtol"),
    [
        (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 1e-5),
        (dict(load_in_4bit=True, bnb_4bit_use_double_quant=True), 1e-5),
        (dict(load_in_8bit=True), 0.03),
    ],
    ids=["nf4", "fp4-double", "int8"],
)
def test_a_quantized_head_is_read_as_the_weights_it_stands_for(keys, rtol, tmp_path):
    tiny.save_model(tmp_path, hidden_size=64, initializer_range=0.5)
    config = BitsAndBytesConfig(**keys, llm_int8_skip_modules=["none"])
    if "load_in_4bit" in keys:
        config.bnb_4bit_compute_dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "bit" in type(model.lm_head).__name__
    model.train()
    assert_same_logits(model, rtol)
    check_head(model)


@pytest.mark.parametrize(
    "keys", [{"logits_scaling": 8.0}, {"output_logit_soft_cap": 30.0}]
)
def test_an_unknown_transform_of_the_logits_is_named_and_not_guessed(keys):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SIZES, **keys)
    )
    with pytest.raises(HeadError, match=f"config has `{next(iter(keys))}`"):
        head_of(model)


class Doubled(LlamaForCausalLM):
    """Does something to its logits that no config names."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_a_transform_that_the_config_does_not_name_is_found_by_comparing():
    model = Doubled(MODELS["llama"]).train()
    assert head_of(model).scale == 1.0
    with pytest.raises(HeadError, match="differ .* by 50%"):
        check_head(model)
    assert model.training


def lora(**keys):
    model = AutoModelForCausalLM.from_config(MODELS["llama"])
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **keys))


def test_a_trained_copy_of_the_head_is_the_policys_and_not_the_references():
    model = lora(modules_to_save=["lm_head"])
    lm = causal_lm(model)
    (trained,) = head_modules(lm)
    assert trained.weight.requires_grad
    with reference_adapter(model):
        (original,) = head_modules(lm)
    assert original is not trained
    assert not original.weight.requires_grad
    assert head_modules(lm) == [trained]


def lora_on_the_head(kind="llama", **keys):
    model = get_peft_model(
        build(kind), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **keys)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_lora_on_the_head_is_the_policys_and_not_the_references(kind):
    model = lora_on_the_head(kind, lora_alpha=6)
    assert_same_logits(model)
    lm = causal_lm(model)
    assert [type(m).__name__ for m in head_modules(lm)] == ["Linear"] * 2
    with reference_adapter(model):
        assert head_of(lm).lora == ()
        assert_same_logits(model)
        assert len(head_modules(lm)) == 1


HEADS = {
    "lora": dict(target_modules=["q_proj", "lm_head"]),
    "copy": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def moved_adapter(head):
    """A model with an adapter in body and head, of which every weight was moved."""
    model = get_peft_model(build("llama"), LoraConfig(r=2, **HEADS[head]))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_a_reference_without_an_adapter_is_that_of_the_base_model(head):
    """It is asked for while the adapter is on, as the policy is scored beside it."""
    model, base = moved_adapter(head), build("llama")
    with torch.no_grad():
        own = base(IDS).logits.flatten(0, 1)
        hidden = completion_hidden(base, INPUTS, EVERY)
        (module,), read = shared_reference_head(model)
        torch.testing.assert_close(read.logits(hidden), own)
        assert not torch.allclose(head_of(causal_lm(model)).logits(hidden), own)
    assert module.weight is read.weight


def test_the_head_of_a_reference_that_is_an_adapter_has_what_that_adapter_learnt():
    """As with `lora_model_dir`: `ref` stays where the run began, `default` goes on."""
    start = moved_adapter("lora").merge_and_unload().eval()
    model = moved_adapter("lora")
    model.add_adapter("ref", model.peft_config["default"])
    copy_to_reference_adapter(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "default" in name:
                parameter += 1
        own = start(IDS).logits.flatten(0, 1)
        hidden = completion_hidden(start, INPUTS, EVERY)
        modules, read = shared_reference_head(model)
        torch.testing.assert_close(read.logits(hidden), own, rtol=1e-5, atol=1e-5)
    assert modules[1:] == [causal_lm(model).lm_head.lora_B["ref"]]


def test_lora_on_the_head_learns_as_in_the_model_itself():
    """Gradients of both factors and of the body, against autograd through the model."""
    model = lora_on_the_head(lora_dropout=0.0).eval()
    lm, y = causal_lm(model), EVERY.targets
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = completion_hidden(lm, INPUTS, EVERY)
    head = head_of(lm)
    ours = token_stats(hidden, hidden.detach(), head, head, y, 0.01).policy_logp
    own = model(IDS).logits.flatten(0, 1).log_softmax(-1).gather(1, y[:, None])[:, 0]
    weights = torch.linspace(-1, 1, 16)
    got = torch.autograd.grad((ours * weights).sum(), trained)
    want = torch.autograd.grad((own * weights).sum(), trained)
    assert len(trained) == 2 * (2 + 1)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_a_head_of_another_type_is_named():
    model = build("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(HeadError, match="its type is Sequential"):
        head_of(model)


def test_an_adapter_of_the_head_that_is_more_than_lora_is_named():
    model = lora_on_the_head(use_dora=True)
    with pytest.raises(HeadError, match="DoRA"):
        head_of(causal_lm(model))
