"""Checks that axolotl's LoRA kernels compute the model of the recipe.

check_activation   before the model is loaded: the activation of its MLPs
check_attached     after axolotl has attached the kernels: the layers, the adapter
attached_kernels   which kernels a model has; `tests/test_upstream.py` pins their names
"""

from typing import Any

from axolotl.loaders.utils import load_model_config
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..errors import refuse

MLP = "lora_mlp_kernel"
# Kernel -> the layers that all need LoRA.
LAYERS = {
    MLP: "gate_proj, up_proj and down_proj",
    "lora_qkv_kernel": "q_proj, k_proj and v_proj",
    "lora_o_kernel": "o_proj",
    "lora_embedding_kernel": "embed_tokens",
}
# Activations that `lora_mlp_kernel` computes as the model does. axolotl also takes it
# for other kinds of GELU, such as the approximation of Gemma, and computes this one.
ACTIVATIONS = ("silu", "gelu", "relu2")
# Config keys that name the activation, in the order in which axolotl looks for them.
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")


def check_activation(cfg: Any) -> None:
    """Refuses `lora_mlp_kernel` if it would replace the activation by another one.

    Args:
        cfg: axolotl's config, validated.

    Raises:
        ValueError: Names key, value and what to set.
    """
    if not cfg.get(MLP):
        return
    config = load_model_config(cfg).get_text_config()
    names = (getattr(config, key, None) for key in ACTIVATION_KEYS)
    name = next(filter(None, names), None)
    if name is not None and name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        remedy = f"remove it: this model has the activation {name}, the kernel {known}"
        refuse(MLP, True, remedy)


def check_attached(cfg: Any, model: Any) -> None:
    """Refuses kernels that no layer has, and adapters of which kernels ignore a part.

    Args:
        cfg: axolotl's config, validated.
        model: The policy, after axolotl has attached the kernels.

    Raises:
        ValueError: Names key, value and what to set.
    """
    wanted = [key for key in LAYERS if cfg.get(key)]
    if not wanted:
        return
    if not isinstance(model, PeftModel):
        refuse(wanted[0], True, "remove it, or set `lora_model_dir`: no LoRA is here")
    attached = attached_kernels(model)
    for key in wanted:
        if key not in attached:
            refuse(key, True, f"remove it: no layer has LoRA on all of {LAYERS[key]}")
    if what := _left_out(model):
        remedy = f"it has {what}, which LoRA kernels leave out: remove `{wanted[0]}`"
        refuse("lora_model_dir", cfg.lora_model_dir, remedy)


def attached_kernels(model: Any) -> set[str]:
    """The keys of the LoRA kernels that axolotl has attached to layers of a model.

    axolotl 0.21 attaches a kernel by setting a method of a module. It is known by the
    function, or, in layers of linear attention, by the name of the method.
    """
    # imported here, as it loads bitsandbytes, which most runs do not need
    from axolotl.kernels import lora

    keys = {
        lora.apply_lora_mlp_swiglu: "lora_mlp_kernel",
        lora.apply_lora_mlp_geglu: "lora_mlp_kernel",
        lora.apply_lora_mlp_relu2: "lora_mlp_kernel",
        lora.apply_lora_qkv: "lora_qkv_kernel",
        lora.apply_lora_qk: "lora_qkv_kernel",
        lora.apply_lora_o: "lora_o_kernel",
        lora.apply_lora_embedding: "lora_embedding_kernel",
        "apply_in_proj_fused": "lora_qkv_kernel",
        "apply_out_proj": "lora_o_kernel",
    }
    found = set()
    for module in model.modules():
        for name, value in vars(module).items():
            function = getattr(value, "__func__", None)
            found |= {keys[key] for key in (name, function) if key in keys}
    return found


def _left_out(model: PeftModel) -> str:
    """Names a part of the active adapter that LoRA kernels ignore; "" if there is none.

    The kernels compute x W + scaling · x A B. So they do not train biases, and they do
    not compute variants of LoRA, such as DoRA.
    """
    name = model.active_adapter
    if model.peft_config[name].bias != "none":  # type: ignore[attr-defined]
        return "trained biases"
    layers = (m for m in model.modules() if isinstance(m, LoraLayer))
    variants = (layer.lora_variant.get(name) for layer in layers)
    variant = next(filter(None, variants), None)
    return "" if variant is None else type(variant).__name__
