"""Adapters, quantized bases, partly frozen models: what trains, and what is saved."""

import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.schemas.peft import LoraConfig
from helpers import matrix, tiny
from helpers.lora_kernels import KERNELS, on_this_machine
from helpers.matrix import Cell
from helpers.tiny import LORA, NF4
from peft import PeftModel, PeftType, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_edpo.models.attached_kernels import attached_kernels
from axolotl_edpo.upstream import patches_adapters_late

CHOSEN = {**LORA, "lora_target_linear": None}  # beside `lora_target_modules`
INT4 = dict(weight_dtype="int4", activation_dtype="int8", group_size=32)
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"lora_target_modules": [*LAYERS, "embed_tokens"]}
# Before axolotl 0.21, kernels of LoRA are refused.
EARLY = "" if patches_adapters_late() else "`lora_mlp_kernel: true`.*remove it"
LETTERS = tiny.byte_tokenizer().convert_tokens_to_ids(["a", "e", "s"])
TIED = dict(tie_word_embeddings=True)
GPT2 = dict(n_inner=64)
WIDE = dict(hidden_size=64, head_dim=16)  # torchao quantizes groups of 32
WIDER = dict(**WIDE, intermediate_size=128)  # and of 64
OURS, MIXLORA = (
    ["axolotl_edpo.EDPOPlugin"],
    "axolotl.integrations.mixlora.MixLoraPlugin",
)
MIX = dict(mixlora_num_experts=4, mixlora_top_k=2)
NO_MIX = matrix.without("mixlora_num_experts")
NO_FLOAT32 = matrix.without("lora_fp32_gradients")
NO_BACKEND = matrix.without("nf4_backend")

LOW_RANK = r"\.lora_[AB]\."
HEAD = r"lm_head\.modules_to_save\."
EMBEDDING = r"embed_tokens\.modules_to_save\."
MAGNITUDE = r"\.lora_magnitude_vector\."
TOKENS = r"embed_tokens\.token_adapter\.trainable_tokens_delta\."


@dataclass(frozen=True)
class Adapter(Cell):
    """A cell with what it trains.

    Attributes:
        trains: Regular expressions; each finds a trained parameter, and each trained
            parameter is found by one.
        took: Whether the option took effect, where `trains` does not say.
        packed: Whether it is also trained with `sample_packing: true`.
        start: Keys of the run whose adapter is trained further.
        kind: `model_type`.
        config: What the model's config has besides SIZES.
    """

    trains: tuple[str, ...] = (LOW_RANK,)
    took: Callable[[Any], bool] = lambda trainer: True
    packed: bool = False
    start: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)


def layer(trainer, name: str) -> Any:
    """PEFT's layer around a module of the first decoder layer."""
    found = dict(trainer.model.named_modules())
    return next(found[path] for path in found if path.endswith(f"layers.0.{name}"))


def linear_type(trainer) -> str:
    return type(layer(trainer, "self_attn.q_proj").base_layer).__name__


def parametrization(trainer) -> str:
    """What gives a weight its values."""
    base = layer(trainer, "self_attn.q_proj").base_layer
    return type(base.parametrizations.weight[0]).__name__


def rates(trainer) -> dict[str, float]:
    """Learning rate of every trained parameter."""
    groups = trainer.optimizer.param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = trainer.model.named_parameters()
    return {name: by_id[id(p)] for name, p in named if p.requires_grad}


def has_loraplus_rates(trainer) -> bool:
    return all(
        rate == pytest.approx(16e-3 if ".lora_B." in name else 1e-3)
        for name, rate in rates(trainer).items()
    )


def has_rows_frozen(trainer) -> bool:
    """Rows of the embedding from 30 on are as they were."""
    start, now = base_weights(trainer), trainer.model.get_input_embeddings().weight
    before = start["model.embed_tokens.weight"]
    return torch.equal(now[30:], before[30:])


def is_float32(trainer) -> bool:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return {p.dtype for p in trained} == {torch.float32}


CELLS = [
    Adapter("`adapter: lora`, `lora_target_linear`", LORA, packed=True),
    Adapter(
        "`adapter: qlora` (NF4)",
        NF4,
        took=lambda t: linear_type(t) == "Linear4bit",
        packed=True,
    ),
    Adapter(
        "`adapter: qlora`, `bnb_config_kwargs: {bnb_4bit_quant_type: fp4}`",
        NF4 | {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
        took=lambda t: (
            layer(t, "self_attn.q_proj").base_layer.weight.quant_type == "fp4"
        ),
    ),
    Adapter(
        "`adapter: qlora`, `nf4_backend: torchao`",
        NF4 | {"nf4_backend": "torchao"},
        took=lambda t: parametrization(t) == "TorchaoNF4Parametrization",
        config=WIDER,
        missing=NO_BACKEND,
    ),
    Adapter(
        "`nf4_backend: torchao` without `adapter: qlora`",
        LORA | {"nf4_backend": "torchao"},
        refused="NF4 requires adapter: qlora and load_in_4bit: true",
        note="axolotl's message",
        missing=NO_BACKEND,
    ),
    Adapter(
        "`adapter: lora`, `load_in_8bit`",
        LORA | {"load_in_8bit": True, "bf16": True},
        took=lambda t: linear_type(t) == "Linear8bitLt",
        packed=True,
    ),
    Adapter(
        "`adapter: lora`, `load_in_4bit`",
        LORA | {"load_in_4bit": True, "bf16": True},
        refused=r"`load_in_4bit: true`.*`adapter: qlora`",
        note="`rl: dpo` trains it, with nothing quantized",
    ),
    Adapter(
        "DoRA (`peft_use_dora`)",
        LORA | {"peft_use_dora": True},
        trains=(LOW_RANK, MAGNITUDE),
        packed=True,
    ),
    Adapter(
        "DoRA over NF4",
        NF4 | {"peft_use_dora": True},
        trains=(LOW_RANK, MAGNITUDE),
    ),
    Adapter(
        "rsLoRA (`peft_use_rslora`)",
        LORA | {"peft_use_rslora": True},
        took=lambda t: layer(t, "mlp.up_proj").scaling["default"] == 8 / 4**0.5,
    ),
    Adapter(
        "LoRA+ (`loraplus_lr_ratio`)",
        LORA | {"loraplus_lr_ratio": 16},
        took=has_loraplus_rates,
    ),
    Adapter(
        "`lora_fp32_gradients`",
        LORA | {"lora_fp32_gradients": True, "bf16": True},
        took=is_float32,
        missing=NO_FLOAT32,
    ),
    Adapter(
        "`lora_fp32_gradients` over NF4",
        NF4 | {"lora_fp32_gradients": True},
        took=is_float32,
        note="`rl: dpo` trains in bfloat16 nevertheless",
        missing=NO_FLOAT32,
    ),
    Adapter(
        "`lora_fp32_gradients` without an adapter",
        {"lora_fp32_gradients": True},
        refused="lora_fp32_gradients requires a LoRA adapter",
        note="axolotl's message",
        missing=NO_FLOAT32,
    ),
    Adapter(
        "`nvfp4_merge_aware`",
        LORA | {"nvfp4_merge_aware": True},
        untested="a Blackwell GPU and a base in NVFP4",
        missing=matrix.without("nvfp4_merge_aware"),
    ),
    Adapter(
        "`lora_dropout`",
        LORA | {"lora_dropout": 0.1},
        took=lambda t: layer(t, "mlp.up_proj").lora_dropout["default"].p == 0,
        note="TRL switches all dropout off, also in `rl: dpo`",
    ),
    Adapter(
        "`lora_target_modules`, a list",
        CHOSEN | {"lora_target_modules": ["q_proj", "down_proj"]},
        trains=(r"\.q_proj\.lora_[AB]\.", r"\.down_proj\.lora_[AB]\."),
    ),
    Adapter(
        "`lora_target_modules`, a regular expression",
        CHOSEN | {"lora_target_modules": r".*\.layers\.1\..*\.q_proj"},
        trains=(r"\.layers\.1\.self_attn\.q_proj\.lora_[AB]\.",),
    ),
    Adapter(
        "LoRA on `lm_head` and `embed_tokens`",
        CHOSEN | {"lora_target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        trains=(LOW_RANK, r"lm_head\.lora_[AB]\.", r"\.lora_embedding_[AB]\."),
        packed=True,
    ),
    Adapter(
        "LoRA on a tied `embed_tokens`",
        CHOSEN | {"lora_target_modules": ["q_proj", "embed_tokens"]},
        refused="`lora_target_modules: .*one weight.*`peft_ensure_weight_tying: true`",
        config=TIED,
        note="no merged model would equal it; `rl: dpo` trains it",
    ),
    Adapter(
        "`lora_modules_to_save: [embed_tokens, lm_head]`, tied",
        LORA | {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
        refused="`lora_modules_to_save: .*one weight.*`peft_ensure_weight_tying: true`",
        config=TIED,
        note="trained as two weights, merged as one; `merge_method: legacy` unties "
        "the merged model",
    ),
    Adapter(
        "DoRA on `lm_head`",
        CHOSEN | {"lora_target_modules": ["q_proj", "lm_head"], "peft_use_dora": True},
        trains=(LOW_RANK, MAGNITUDE, r"lm_head\.lora_magnitude_vector\."),
        note="the model makes its own logits, with a warning",
    ),
    Adapter(
        "`lora_target_parameters`",
        CHOSEN | {"lora_target_parameters": ["mlp.down_proj.weight"]},
        trains=(r"\.down_proj\.lora_[AB]\.",),
    ),
    Adapter(
        "`lora_modules_to_save: [embed_tokens, lm_head]`",
        LORA | {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
        trains=(LOW_RANK, HEAD, EMBEDDING),
        packed=True,
    ),
    Adapter(
        "the same over NF4",
        NF4 | {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
        trains=(LOW_RANK, HEAD, EMBEDDING),
    ),
    Adapter(
        "the same, tied, with `peft_ensure_weight_tying`",
        LORA
        | {"lora_modules_to_save": ["embed_tokens"], "peft_ensure_weight_tying": True},
        trains=(LOW_RANK, EMBEDDING),
        config=TIED,
        note="`rl: dpo` trains it and then fails to save",
    ),
    Adapter(
        "`peft_trainable_token_indices`",
        LORA | {"peft_trainable_token_indices": LETTERS},
        trains=(LOW_RANK, TOKENS),
        packed=True,
    ),
    Adapter(
        "`peft_trainable_token_indices`, tied",
        LORA | {"peft_trainable_token_indices": LETTERS},
        trains=(LOW_RANK, TOKENS),
        config=TIED,
        note="`rl: dpo` trains it and then fails to save; the model makes its own "
        "logits, with a warning",
    ),
    Adapter(
        "`peft_layers_to_transform`",
        LORA | {"peft_layers_to_transform": [1]},
        trains=(r"\.layers\.1\..*\.lora_[AB]\.",),
    ),
    Adapter(
        "`peft_layer_replication`",
        LORA | {"peft_layer_replication": [[0, 2], [1, 2]]},
        trains=(LOW_RANK, r"\.layers\.2\..*\.lora_[AB]\."),
        note="`rl: dpo` trains it and then fails to save",
    ),
    Adapter(
        "`lora_rank_pattern`, `lora_alpha_pattern`",
        LORA
        | {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"q_proj": 3}},
        took=lambda t: (
            layer(t, "self_attn.q_proj").scaling["default"] == 3 / 2
            and layer(t, "self_attn.k_proj").scaling["default"] == 8 / 4
        ),
    ),
    Adapter(
        "`lora_fan_in_fan_out` (GPT-2)",
        CHOSEN | {"lora_target_modules": ["c_attn"], "lora_fan_in_fan_out": True},
        kind="gpt2",
        config=GPT2,
    ),
    Adapter(
        "`lora_bias`",
        LORA | {"lora_bias": "all"},
        config={"attention_bias": True},
        note="no key of axolotl: ignored, no bias trains",
    ),
    Adapter("`lora_on_cpu`", LORA | {"lora_on_cpu": True}),
    Adapter(
        "`peft_init_lora_weights: gaussian`",
        LORA | {"peft_init_lora_weights": "gaussian"},
    ),
    *(
        Adapter(
            f"`peft_init_lora_weights: {name}`",
            LORA | {"peft_init_lora_weights": name},
            refused=f"`peft_init_lora_weights: {name}`.*`base_model`",
            note="starts away from `base_model`, or leaves it changed",
        )
        for name in ("pissa", "olora", "loftq", "eva", "corda")
    ),
    Adapter(
        "`peft_autocast_adapter_dtype: false`",
        LORA | {"peft_autocast_adapter_dtype": False},
        refused="`peft_autocast_adapter_dtype: false`.*remove it",
        note="ignored by `rl: dpo`",
    ),
    Adapter(
        "`lora_model_dir`, an adapter trained further",
        LORA,
        start=LORA,
        packed=True,
        note="the reference is the adapter as it starts",
    ),
    Adapter(
        "`lora_model_dir`: DoRA, saved head, trained tokens",
        LORA,
        trains=(LOW_RANK, MAGNITUDE, HEAD, TOKENS),
        start=LORA
        | {
            "peft_use_dora": True,
            "lora_modules_to_save": ["lm_head"],
            "peft_trainable_token_indices": LETTERS,
        },
        note="what the adapter is made of comes from its own config",
    ),
    Adapter("`lora_model_dir` over NF4", NF4, start=NF4),
    Adapter(
        "`lora_model_dir` of an adapter with `lora_target_parameters`",
        LORA,
        start=CHOSEN | {"lora_target_parameters": ["mlp.down_proj.weight"]},
        refused="`lora_model_dir`.*merge it",
        note="PEFT holds no second such adapter; `rl: dpo` starts a fresh one",
    ),
    Adapter(
        "`rl_adapter_ref_model`",
        LORA | {"rl_adapter_ref_model": True},
        took=lambda t: t.ref_model is None,
        note="no key of axolotl: ignored, the reference is `base_model` anyway",
    ),
    Adapter(
        "`lora_mlp_kernel`, `lora_qkv_kernel`, `lora_o_kernel`",
        LORA | KERNELS,
        refused=EARLY,
        took=lambda t: attached_kernels(t.model) == {*KERNELS},
        note="`rl: dpo` stops with `Model must be a PeftModelForCausalLM`"
        if EARLY
        else "in float32 the run without them to 1e-5, packed or not, by the Triton "
        "interpreter; 16 bits and NF4 take a GPU",
    ),
    Adapter(
        "`lora_embedding_kernel` beside them",
        CHOSEN | KERNELS | TARGETS | {"lora_embedding_kernel": True},
        trains=(LOW_RANK, r"\.lora_embedding_[AB]\."),
        refused=EARLY,
        took=lambda t: "lora_embedding_kernel" in attached_kernels(t.model),
    ),
    Adapter(
        "`lora_embedding_kernel` alone",
        LORA | {"lora_embedding_kernel": True},
        refused="`lora_embedding_kernel: true`.*remove it",
        note="ignored by `rl: dpo`",
    ),
    Adapter(
        "`lora_mlp_kernel` with `peft_use_dora`",
        LORA | KERNELS | {"peft_use_dora": True},
        refused=EARLY or "`peft_use_dora: true`.*`lora_mlp_kernel: true`",
        note=EARLY
        and "no kernel is taken"
        or "policy and reference would differ before the first step",
    ),
    Adapter(
        "`lora_mlp_kernel` on a model with an approximated GELU (Gemma)",
        LORA | KERNELS,
        refused=EARLY or "`lora_mlp_kernel: true`.*activation gelu_pytorch_tanh",
        kind="gemma2",
        config=dict(hidden_activation="gelu_pytorch_tanh"),
        note=EARLY
        and "no kernel is taken"
        or "the kernel has the exact one; the other kernels are taken",
    ),
    Adapter(
        "LoRA kernels where no layer has LoRA on all that they fuse",
        CHOSEN | KERNELS | {"lora_target_modules": ["q_proj", "v_proj"]},
        refused=EARLY or "`lora_mlp_kernel: true`.*no layer has LoRA on all of",
        note=EARLY and "no kernel is taken" or "`rl: dpo` warns",
    ),
    Adapter(
        "`relora`",
        LORA | {"relora": True, "jagged_restart_steps": 1},
        refused="`relora: true`.*remove it",
        note="ignored by `rl: dpo`",
    ),
    Adapter(
        "`merge_lora: true` in the recipe",
        LORA | {"merge_lora": True},
        refused="merge and unload the existing adapter",
        note="it is the switch of `axolotl merge-lora`, which works; `rl: dpo` stops "
        "with the same message",
    ),
    Adapter(
        "`adapter: llama-adapter`",
        {"adapter": "llama-adapter"},
        refused="`adapter: llama-adapter`.*`adapter: lora`",
        note="axolotl fails on it with any `rl`: it has no keys for its size",
    ),
    Adapter(
        "`adapter: mora`",
        {"adapter": "mora"},
        untested="the MoRA build of PEFT",
    ),
    Adapter(
        "`adapter: mixlora` (its plugin), `mixlora_*`",
        {**LORA, **MIX, "adapter": "mixlora", "plugins": [*OURS, MIXLORA]},
        refused="MixLoRA is not compatible with RL training",
        note="axolotl's message",
        missing=NO_MIX,
    ),
    Adapter(
        "any other `adapter`",
        {**LORA, "adapter": "loha"},
        refused="Adapter 'loha' is not built in",
        note="axolotl's message",
    ),
    Adapter(
        "`gptq` with `adapter: lora`",
        untested="GPTQModel, and a GPU",
    ),
    Adapter(
        "`unfrozen_parameters`, some layers",
        {"unfrozen_parameters": ["model.layers.1."]},
        trains=(r"^model\.layers\.1\.",),
        packed=True,
        note="the reference is the whole model as it starts",
    ),
    Adapter(
        "`unfrozen_parameters`, some rows",
        {"unfrozen_parameters": ["model.embed_tokens.weight$[:30]", "lm_head"]},
        trains=(r"embed_tokens\.weight", r"lm_head\.weight"),
        took=has_rows_frozen,
    ),
    Adapter(
        "`unfrozen_parameters` that match nothing",
        {"unfrozen_parameters": ["layers.1."]},
        refused="no weight of the model trains",
        note="`rl: dpo` stops in its first backward pass",
    ),
    Adapter(
        "`unfrozen_parameters` with an adapter",
        LORA | {"unfrozen_parameters": ["model.layers.1."]},
        refused=r"`unfrozen_parameters: .*`lora_modules_to_save`",
        note="ignored by `rl: dpo`",
    ),
    Adapter(
        "`qat`, int4 weights and int8 activations",
        {"qat": INT4},
        trains=(r"^model\.", r"^lm_head"),
        took=lambda t: type(t.ref_model.lm_head).__name__ == "FakeQuantizedLinear",
        packed=True,
        config=WIDE,
        note="policy and reference both; the model makes its own logits, with a "
        "warning",
    ),
    Adapter(
        "`qat.fake_quant_after_n_steps`",
        {"qat": INT4 | {"fake_quant_after_n_steps": 1}},
        refused="`qat.fake_quant_after_n_steps: 1`.*reference",
        config=WIDE,
        note="with `rl: dpo` the policy starts unquantized and the reference quantized",
    ),
    Adapter(
        "`quantization` (for `axolotl quantize`)",
        {"quantization": {"weight_dtype": "int8"}},
        trains=(r"^model\.", r"^lm_head"),
        note="read after training only",
    ),
]
TITLE = "Adapters and frozen weights"
PACKED = "; ".join(cell.name for cell in CELLS if cell.packed)
INTRO = textwrap.fill(
    "Every cell that works: policy and reference are equal at the first step and not "
    "at the second; what should train got gradients and moved, all else is bitwise as "
    "it was; the saved adapter, read by PEFT, is the trained one, and over a fresh "
    "`base_model` in float32 gives the same logits. Also with "
    f"`sample_packing: true`, in float32 to the same losses: {PACKED}.",
    width=88,
    break_on_hyphens=False,
)


def base_weights(trainer) -> dict[str, torch.Tensor]:
    """Of the model on disk that the training started from."""
    model = trainer.model
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    return load_file(Path(lm.config._name_or_path) / "model.safetensors")


def trained(trainer) -> set[str]:
    """Names of the parameters that the optimizer moved."""
    state = trainer.optimizer.state
    return {
        name
        for name, parameter in trainer.model.named_parameters()
        if parameter in state and state[parameter]["exp_avg"].any()
    }


def assert_trained(trainer, trains: tuple[str, ...]) -> None:
    """Everything that matches was trained, and nothing else."""
    names = trained(trainer)
    parameters = dict(trainer.model.named_parameters())
    assert names == {name for name, p in parameters.items() if p.requires_grad}
    for pattern in trains:
        assert any(re.search(pattern, name) for name in names), pattern
    for name in names:
        assert any(re.search(pattern, name) for pattern in trains), name


PEFT_NAME = r"^base_model\.model\.|\.base_layer|\.original_module|\.token_adapter"


def assert_only_trained_weights_moved(trainer) -> None:
    """Weights on disk that do not train are bitwise what they were."""
    now = {
        re.sub(PEFT_NAME, "", name): parameter
        for name, parameter in trainer.model.named_parameters()
    }
    for name, before in base_weights(trainer).items():
        weight = now[name]
        same = torch.equal(weight, before.to(weight.dtype))
        assert same != weight.requires_grad, name


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    ids = torch.tensor([[*LETTERS, *range(60, 90)]])
    return model.eval()(input_ids=ids).logits.float()


def assert_saved_adapter_is_the_trained_one(trainer, folder: Path) -> None:
    """Read by PEFT, bit by bit; and what it does to a base in float32."""
    lm = trainer.model.get_base_model()
    base = AutoModelForCausalLM.from_pretrained(lm.config._name_or_path)
    start = logits_of(base)
    read = PeftModel.from_pretrained(base, folder)
    saved, own = map(get_peft_model_state_dict, (read, trainer.model))
    assert saved.keys() == own.keys()
    for name, value in saved.items():
        assert torch.equal(value, own[name].to(value.dtype)), name
    if not trainer.args.bf16:
        now = logits_of(trainer.model)
        moved = (now - start).abs().max()
        assert (logits_of(read) - now).abs().max() < 1e-3 * moved


def assert_as_the_cell_says(cell: Adapter, trainer, folder: Path) -> None:
    assert cell.took(trainer)
    assert_trained(trainer, cell.trains)
    if not any(key.startswith("load_in_") for key in cell.keys):
        assert_only_trained_weights_moved(trainer)
    if cell.keys.get("adapter"):
        assert not list(folder.glob("model*.safetensors"))
        assert_saved_adapter_is_the_trained_one(trainer, folder)


def is_first(cell: Adapter) -> bool:
    """What packs, what reads or trains the head, and what is refused."""
    return bool(cell.packed or cell.refused or "lm_head" in cell.name)


@pytest.fixture(autouse=True)
def kernels_run_here():
    with on_this_machine():
        yield


@matrix.cells(CELLS, is_first)
def test_an_adapter_trains_what_it_should_and_is_saved(cell, recipe, tmp_path):
    keys = recipe(**cell.keys)
    if cell.config:
        model = tiny.save_model(tmp_path / "model", cell.kind, **cell.config)
        keys["base_model"] = str(model)
    if cell.start:
        first = tmp_path / "first"
        keys["lora_model_dir"] = str(first)
        started = tiny.train(
            tmp_path, recipe(**cell.start, output_dir=str(first), max_steps=2)
        )
    trainer = matrix.assert_cell(cell, tmp_path, keys)
    if cell.refused:
        return
    assert_as_the_cell_says(cell, trainer, tmp_path / "out")
    if cell.start:  # the same pairs, from elsewhere
        a, b = (tiny.logs(t)[0]["logps/chosen"] for t in (started, trainer))
        assert a != b
    if cell.packed:
        packed = matrix.assert_cell(cell, tmp_path, {**keys, "sample_packing": True})
        losses = [[log["loss"] for log in tiny.logs(t)] for t in (trainer, packed)]
        assert keys["bf16"] or losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_every_adapter_that_axolotl_knows_has_a_cell():
    names = {str(kind.value).lower() for kind in PeftType}
    accepted = set()
    for name in names | {"qlora", "llama-adapter", "mora", "loha"}:
        try:
            LoraConfig.validate_adapter({"adapter": name})
            accepted.add(name)
        except ValueError:
            pass
    assert {"lora", "qlora", "llama-adapter"} <= accepted
    assert accepted <= {cell.keys.get("adapter") for cell in CELLS}
