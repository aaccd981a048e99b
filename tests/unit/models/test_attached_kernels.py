"""What axolotl's LoRA kernels compute: the policy, and with the adapter off, the base.

Two models over the same weights: one has the kernels, the other has not. The Triton
parts are interpreted.
"""

import pytest
import torch
from axolotl.kernels import dora
from axolotl.monkeypatch import lora_kernels
from axolotl.utils.dict import DictDefault
from helpers import tiny
from helpers.lora_kernels import KERNELS, on_this_machine
from helpers.releases import needs_late_kernels
from helpers.tiers import first
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_edpo.models.attached_kernels import (
    attached_kernels,
    check_activation,
    check_attached,
)
from axolotl_edpo.models.forward import copy_to_reference_adapter, reference_adapter

pytestmark = needs_late_kernels

IDS = torch.arange(3, 63).view(3, 20)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# SwiGLU; biases of queries, keys and values; norms of heads; windows; GeGLU.
MODELS = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", dict(sliding_window=8)),
    ("llama", dict(hidden_act="gelu")),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that saves a model once and returns its folder."""
    made = {}

    def save(kind: str, **config):
        key = (kind, *config.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[key] = tiny.save_model(folder, kind, **config)
        return made[key]

    return save


@pytest.fixture
def kernels():
    with on_this_machine():
        yield


def load(folder, **keys) -> PeftModel:
    """The model with a fresh adapter; its weights are the same each time."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    config = dict(r=4, lora_alpha=8, target_modules=ALL, lora_dropout=0.0, **keys)
    return get_peft_model(base, LoraConfig(**config)).train()


def attach(model: PeftModel, folder, **keys) -> DictDefault:
    """Attaches the kernels, as axolotl does beside `rl: dpo`; returns the recipe."""
    cfg = DictDefault(base_model=str(folder), adapter="lora", **{**KERNELS, **keys})
    lora_kernels.patch_self_attn_lora(cfg)
    lora_kernels.apply_lora_kernel_patches(model, cfg)
    return cfg


@torch.no_grad()
def train(model: PeftModel, adapter: str = "default") -> None:
    """Gives an adapter weights as after some training."""
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if ".lora_" in name and adapter in name.split("."):
            weight += 0.1 * torch.randn_like(weight)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def gradients(model) -> dict[str, torch.Tensor]:
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.log_softmax(-1)[..., 5].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_same_gradients(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0
        difference = (actual[name] - gradient).abs().max().item()
        assert difference < 1e-5 * scale, name


@pytest.mark.parametrize(("kind", "config"), first(MODELS, 2))
def test_policy_and_reference_are_those_without_kernels(saved, kernels, kind, config):
    folder = saved(kind, **config)
    plain, fused = load(folder), load(folder)
    base = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits(plain), base)
    train(plain)
    trained, expected = logits(plain), gradients(plain)
    cfg = attach(fused, folder)
    assert attached_kernels(fused) == {*KERNELS}
    check_attached(cfg, fused)
    start = logits(fused)
    with reference_adapter(fused):
        assert torch.equal(logits(fused), start)  # exactly, so all steps are 0
    close(start, base)
    train(fused)
    close(logits(fused), trained)
    assert (trained - base).abs().max() > 0.1
    with reference_adapter(fused):
        close(logits(fused), base)
    assert len(expected) == 2 * 2 * len(ALL)
    assert_same_gradients(gradients(fused), expected)


def test_an_adapter_trained_further_is_compared_with_its_start(saved, kernels):
    """The reference is the adapter `ref`; and a merged adapter is not added again."""
    folder = saved("llama")
    model = load(folder)
    train(model)
    model.add_adapter("ref", model.peft_config["default"])
    copy_to_reference_adapter(model)
    attach(model, folder)
    start = logits(model)
    with reference_adapter(model):
        assert torch.equal(logits(model), start)
    train(model)
    trained = logits(model)
    assert (trained - start).abs().max() > 0.1
    with reference_adapter(model):
        assert torch.equal(logits(model), start)
    model.merge_adapter()
    close(logits(model), trained)
    model.unmerge_adapter()
    close(logits(model), trained)


def test_an_embedding_is_adapted_by_its_kernel(saved, kernels):
    folder = saved("llama")
    keys = dict(target_modules=[*ALL, "embed_tokens"])

    def make():
        base = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **keys)).train()

    plain, fused = make(), make()
    train(plain)
    trained, expected = logits(plain), gradients(plain)
    check_attached(attach(fused, folder, lora_embedding_kernel=True), fused)
    start = logits(fused)
    with reference_adapter(fused):
        assert torch.equal(logits(fused), start)
    train(fused)
    close(logits(fused), trained)
    assert_same_gradients(gradients(fused), expected)


def test_dora_is_refused_as_its_norms_are_not_those_of_peft(saved, kernels):
    """At the start PEFT's magnitude is the norm of the weight, so its scale is 1."""
    folder = saved("llama")
    model = load(folder, use_dora=True)
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    weight = layer.base_layer.weight
    norms = torch.linalg.norm(weight + 2.0 * b @ a, dim=1)
    assert torch.equal(magnitude / norms, torch.ones(64))
    scale = dora.triton_dora_scale(weight, None, a, b, 2.0, magnitude, weight.dtype)
    assert 0 < (scale - 1).abs().max() < 1e-5
    cfg = attach(model, folder, lora_model_dir="saved")
    message = "`lora_model_dir: saved`.*DoraLinearVariant.*remove `lora_mlp_kernel`"
    with pytest.raises(ValueError, match=message):
        check_attached(cfg, model)


def test_trained_biases_are_refused_as_they_would_get_no_gradient(saved, kernels):
    folder = saved("qwen2")
    plain, fused = (load(folder, bias="lora_only") for _ in range(2))
    biases = {name for name in gradients(plain) if name.endswith(".bias")}
    cfg = attach(fused, folder, lora_model_dir="saved")
    assert len(biases) == 2 * 3
    actual = gradients(fused)
    assert {name for name, gradient in actual.items() if gradient is None} == biases
    with pytest.raises(ValueError, match="`lora_model_dir: saved`.*trained biases"):
        check_attached(cfg, fused)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_proj"], "`lora_mlp_kernel: true`.*no layer has LoRA on all of "),
        ([*ALL[:2], *ALL[3:]], "`lora_qkv_kernel: true`.*q_proj, k_proj and v_proj"),
        ([*ALL[:3], *ALL[4:]], "`lora_o_kernel: true`.*o_proj"),
        (ALL, "`lora_embedding_kernel: true`.*embed_tokens"),
    ],
    ids=["mlp", "qkv", "o", "embedding"],
)
def test_a_kernel_without_a_layer_is_refused(saved, kernels, targets, message):
    folder = saved("llama")
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    cfg = attach(model, folder, lora_embedding_kernel=True)
    with pytest.raises(ValueError, match=message):
        check_attached(cfg, model)


def test_a_model_without_an_adapter_is_refused_and_no_kernel_is_no_question(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    with pytest.raises(ValueError, match="`lora_o_kernel: true`.*`lora_model_dir`"):
        check_attached(DictDefault(lora_o_kernel=True), model)
    check_attached(DictDefault(lora_o_kernel=False), model)


def test_an_approximated_gelu_is_refused_as_the_kernel_would_compute_the_other(
    saved, kernels
):
    def check(kind: str, **keys) -> None:
        check_activation(DictDefault(base_model=str(saved(kind)), **keys))

    message = "`lora_mlp_kernel: true`.*has the activation gelu_pytorch_tanh"
    with pytest.raises(ValueError, match=message):
        check("gemma2", **KERNELS)
    check("gemma2", lora_qkv_kernel=True, lora_o_kernel=True)
    check("llama", **KERNELS)
    plain, fused = load(saved("gemma2")), load(saved("gemma2"))
    base = logits(plain)
    attach(fused, saved("gemma2"))
    with reference_adapter(fused):
        assert (logits(fused) - base).abs().max() > 1e-4
