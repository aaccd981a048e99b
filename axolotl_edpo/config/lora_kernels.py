"""Rules for axolotl's LoRA kernels, such as `lora_mlp_kernel`.

axolotl 0.21 attaches them to the adapter that the trainer has made. Earlier releases
look for the adapter when they load the model, and stop, as there is none yet.

The reference runs through the same kernels with the adapter off. An adapter that is not
trained yet adds exactly 0 there, so policy and reference are equal to the last bit. The
rules refuse what would break this, and what the kernels would leave out.
"""

from collections.abc import Callable

from ..errors import quote
from ..upstream import patches_adapters_late
from .rules import Recipe, Rule, value_at

MLP = "lora_mlp_kernel"
KERNELS = (MLP, "lora_qkv_kernel", "lora_o_kernel")
EMBEDDING = "lora_embedding_kernel"
QUANTIZED = "bnb_config_kwargs.bnb_4bit_"


def _used(recipe: Recipe) -> list[str]:
    """The kernels of the recipe, without that of embeddings."""
    return [key for key in KERNELS if recipe.get(key)]


def _only_beside_lora(key: str) -> Rule:
    def applies(recipe: Recipe) -> bool:
        trains_lora = recipe.get("adapter") in ("lora", "qlora")
        return bool(recipe.get(key)) and not (trains_lora and patches_adapters_late())

    def remedy(recipe: Recipe) -> str:
        if patches_adapters_late():
            return "remove it, or set `adapter: lora` or `adapter: qlora`"
        return (
            "remove it, or install axolotl 0.21: this release looks for an adapter "
            "that the trainer of preferences adds later"
        )

    return Rule(key, applies, remedy)


def _or_without_kernels(reason: str) -> Callable[[Recipe], str]:
    """A remedy: to remove the key, or all kernels."""

    def remedy(recipe: Recipe) -> str:
        kernels = ", ".join(quote(key, True) for key in _used(recipe))
        return f"remove it, or {kernels}: {reason}"

    return remedy


def _is_misread(recipe: Recipe) -> bool:
    """Whether the kernels would take weights of 4 bits for another type than theirs."""
    is_fp4 = value_at(recipe, f"{QUANTIZED}quant_type") == "fp4"
    twice = value_at(recipe, f"{QUANTIZED}use_double_quant") is not False
    return is_fp4 and twice and bool(_used(recipe))


def _alone(recipe: Recipe) -> str:
    if patches_adapters_late():
        return f"remove it, or set {quote(MLP, True)}, beside which axolotl takes it"
    return "remove it: this release of axolotl takes it for supervised training only"


KERNEL_RULES = (
    *map(_only_beside_lora, KERNELS),
    Rule(
        EMBEDDING,
        lambda recipe: recipe.get(EMBEDDING) and not _used(recipe),
        _alone,
    ),
    Rule(
        "peft_use_dora",
        lambda recipe: recipe.get("peft_use_dora") and _used(recipe),
        _or_without_kernels(
            "they measure weights in another order than PEFT, so the policy would "
            "differ from the reference before the first step"
        ),
    ),
    Rule(
        f"{QUANTIZED}quant_type",
        _is_misread,
        _or_without_kernels("they read all weights of 4 bits as `nf4`"),
    ),
)
