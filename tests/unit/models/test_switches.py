"""switches.py against PEFT's and TRL's own context managers."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from axolotl_edpo.models import switches
from axolotl_edpo.models.switches import adapter_in_use, without_checkpointing

IDS = torch.arange(3, 19).view(2, 8)
SIZES = {**tiny.SIZES, "vocab_size": 100, "initializer_range": 0.5}
LINEAR = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "lora": dict(target_modules=LINEAR),
    "dora": dict(target_modules=LINEAR, use_dora=True),
    "rslora-bias": dict(target_modules=LINEAR, use_rslora=True, lora_bias=True),
    "embedding": dict(target_modules=[*LINEAR, "embed_tokens", "lm_head"]),
    "modules_to_save": dict(target_modules=LINEAR, modules_to_save=["lm_head"]),
    "trainable-tokens": dict(target_modules=LINEAR, trainable_token_indices=[5, 7]),
    "experts": dict(
        target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    ),
}


def base(kind="llama", **keys):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **keys})
    return AutoModelForCausalLM.from_config(config)


def changed(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight that trains, by random numbers: no adapter is the model below it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=generator) / 4
    return model


def adapted(option: str) -> PeftModel:
    model = base("mixtral", **tiny.EXPERTS) if option == "experts" else base()
    return changed(get_peft_model(model, LoraConfig(r=2, **ADAPTERS[option])))


def hidden(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.get_base_model().base_model(IDS).last_hidden_state


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def state(model: torch.nn.Module) -> list:
    """What PEFT or transformers may have changed of it."""
    flags = "_disable_adapters _active_adapter _adapters_disabled active_adapter"
    return [
        *(p.requires_grad for p in model.parameters()),
        *(getattr(m, name, None) for m in model.modules() for name in flags.split()),
        *(getattr(m, "gradient_checkpointing", None) for m in model.modules()),
        *(len(m._forward_hooks) for m in model.modules()),
    ]


def assert_as_with_peft(model: PeftModel, name: str | None) -> None:
    own, before = logits(model), state(model)
    with use_adapter(model, name):
        want, want_hidden = logits(model), hidden(model)
    assert not torch.equal(want, own)
    for _ in range(3):  # the first is recorded
        with adapter_in_use(model, name):
            assert torch.equal(logits(model), want)
            assert torch.equal(hidden(model), want_hidden)
        assert torch.equal(logits(model), own)
        assert state(model) == before


@pytest.mark.parametrize("option", ADAPTERS)
def test_the_model_below_an_adapter_is_the_one_that_peft_shows(option):
    assert_as_with_peft(adapted(option), None)


def test_the_model_below_an_adapter_in_four_bits_too(tmp_path):
    tiny.save_model(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=LINEAR))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == (
        "Linear4bit"
    )
    # in evaluation bitsandbytes packs the weights of some processors
    assert_as_with_peft(changed(model).train(), None)


@pytest.mark.parametrize("option", ["lora", "dora", "embedding", "modules_to_save"])
def test_another_adapter_is_the_one_that_peft_shows(option):
    model = adapted(option)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    changed(model)
    model.set_adapter("default")
    assert_as_with_peft(model, "ref")


@pytest.mark.parametrize("name", [None, "ref"])
def test_an_error_within_leaves_everything_as_it_was(name):
    model = adapted("modules_to_save")
    model.add_adapter("ref", model.peft_config["default"])
    before = state(model)
    for _ in range(2):
        with pytest.raises(KeyError), adapter_in_use(model, name):
            assert state(model) != before
            raise KeyError
        assert state(model) == before


def test_weights_that_are_frozen_by_hand_stay_frozen():
    """PEFT would have all of the adapter trained from now on."""
    model = adapted("lora")
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    before = state(model)
    with adapter_in_use(model, None):
        pass
    assert state(model) == before


def walks(monkeypatch) -> list:
    """Grows whenever PEFT is asked."""
    asked = []

    @contextmanager
    def counted(model, adapter_name):
        asked.append(adapter_name)
        with use_adapter(model, adapter_name):
            yield

    monkeypatch.setattr(switches, "use_adapter", counted)
    return asked


def test_peft_is_asked_once_and_again_where_adapters_or_modules_are_others(monkeypatch):
    model, asked = adapted("lora"), walks(monkeypatch)
    for _ in range(3):
        with adapter_in_use(model, None):
            pass
    assert asked == [None]
    model.add_adapter("ref", model.peft_config["default"])
    for name in (None, "ref") * 2:
        with adapter_in_use(model, name):
            pass
    assert asked == [None, None, "ref"]
    model.delete_adapter("ref")
    attention = model.base_model.model.model.layers[1].self_attn
    with adapter_in_use(model, None):
        want = logits(model)
    attention.q_proj = attention.q_proj.get_base_layer()
    gc.collect()
    with adapter_in_use(model, None):
        assert torch.equal(logits(model), want)
    assert asked == [None, None, "ref", None, None]


def test_a_merged_adapter_is_taken_out_of_the_weights_as_by_peft():
    model = adapted("lora")
    with adapter_in_use(model, None):
        want = logits(model)
    model.merge_adapter()
    with adapter_in_use(model, None):
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


def test_another_kind_of_adapter_is_left_to_peft(monkeypatch):
    keys = dict(target_modules=["v_proj", "down_proj"])
    config = IA3Config(feedforward_modules=["down_proj"], **keys)
    model, asked = changed(get_peft_model(base(), config)), walks(monkeypatch)
    with use_adapter(model, None):
        want = logits(model)
    for _ in range(2):
        with adapter_in_use(model, None):
            assert torch.equal(logits(model), want)
    assert asked == [None, None]


def checkpointed(every_n_layers=1) -> torch.nn.Module:
    model = base(num_hidden_layers=4).train()
    model.gradient_checkpointing_enable(every_n_layers=every_n_layers)
    return model


def test_nothing_is_checkpointed_within_and_what_was_is_again():
    model = checkpointed(every_n_layers=2)
    before = state(model)
    assert model.is_gradient_checkpointing
    for _ in range(2):
        with pytest.raises(KeyError), without_checkpointing(model):
            assert not model.is_gradient_checkpointing
            raise KeyError
        assert state(model) == before
    layers = [layer.gradient_checkpointing for layer in model.model.layers]
    assert layers == [True, False, True, False]


def test_checkpointing_that_was_off_stays_off_and_one_turned_on_later_is_seen():
    model = base().train()
    with without_checkpointing(model):
        pass
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    with without_checkpointing(model):
        assert not model.is_gradient_checkpointing
    assert model.is_gradient_checkpointing


def test_trl_puts_another_hook_on_the_embedding_each_time():
    """Why it is not asked."""
    model = checkpointed()
    hooks = model.get_input_embeddings()._forward_hooks
    assert len(hooks) == 1
    for _ in range(3):
        with without_checkpointing(model):
            pass
    assert len(hooks) == 1
    for _ in range(3):
        with disable_gradient_checkpointing(model):
            pass
    assert len(hooks) == 4


def test_models_are_let_go():
    model = adapted("lora")
    with adapter_in_use(model, None), without_checkpointing(model):
        pass
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
