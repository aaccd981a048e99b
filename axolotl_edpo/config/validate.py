"""Refuses a recipe that would not train as written, in one line.

Key, value and remedy; before axolotl validates the YAML, and before a model is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import refuse
from ..losses.edpo import LOWEST_BATCH_BETA
from ..losses.preference import SFT, LossSettings
from ..upstream import default_fsdp_version, patches_adapters_late
from .args import (
    CACHE,
    CONTROL,
    LOWERED,
    OF_CONTROL,
    PRECOMPUTE,
    PREFIX,
    Bounds,
    EDPOArgs,
    Moving,
    lowered_packing,
)
from .dataset_entries import check_entries
from .typos import check_own_keys

SUPERVISED = "remove it: axolotl gives it to supervised training only"
# Recipe keys that would change the loss or the batch in a way this version does not
# compute, or that would do nothing: key -> what to set instead.
UNSUPPORTED = {
    "reference_free": "remove it: ε-DPO compares policy and reference",
    "dpo_norm_loss": "remove it",
    "fsdp": "set `fsdp_version: 2` and `fsdp_config:`",
    "is_multimodal": "use a text model, or `rl: dpo`",
    "processor_type": "use a text model, or `rl: dpo`",
    "orpo_alpha": "remove it: axolotl would take it for `beta`",
    "dataset_shard_num": "axolotl ignores it beside `rl`: set `split: train[:10%]` in "
    "`datasets:`",
    "reward_model": "remove it: it asks for another trainer",
    "process_reward_model": "remove it: it asks for another trainer",
    "neftune_noise_alpha": "remove it: its noise would count as distance from the "
    "reference",
    "noisy_embedding_alpha": "remove it: its noise would count as distance from the "
    "reference",
    "relora": SUPERVISED,
    "lisa_step_interval": SUPERVISED,
    "use_eaft": SUPERVISED,
    "use_dft": SUPERVISED,
    "balance_labels": SUPERVISED,
    "diffusion_lm": "remove it: a diffusion model has no log-probability of an answer",
}
# Recipe keys that axolotl ignores beside `rl`, and that change neither weights nor
# pairs -> what does something like it.
WITHOUT_EFFECT = {
    "group_by_length": "`sample_packing: true` needs no padding at all",
    "auto_find_batch_size": "set `micro_batch_size` to what fits",
    "layer_offloading": "`deepspeed:` or `fsdp_config:` offload",
    "lora_embedding_kernel": "it goes with the other kernels of LoRA",
    "do_bench_eval": "it is for supervised training",
    "do_causal_lm_eval": "it is for supervised training",
    "generate_samples": "it is for supervised training",
}
# What only a GPU can do -> what to set where there is none.
NEEDS_GPU = {
    "fp16": "set `bf16: true` (`auto` becomes fp16)",
    "float16": "set `bf16: true`",
    "activation_offloading": "remove it",
    "profiler_steps": "remove it",
}
# Keys that name a file, or a directory: a file in it, and a remedy.
FILES = {
    "base_model": ("config.json", "name a folder with a model, or one on the hub"),
    "lora_model_dir": ("adapter_config.json", "name the folder of a saved adapter"),
    "deepspeed": ("", "`axolotl fetch deepspeed_configs` gets those of axolotl"),
    "chat_template_jinja": ("", "a template would have `{`, this is taken for a file"),
}
# Keys with lines of their own.
SECTIONS = (
    "trl",
    "peft",
    "qat",
    "accelerator_config",
    "fsdp_config",
    "context_parallel",
)
OF_A_RANK = ": an answer is scored whole, and a rank would have a part of it"
# Keys that split a model or a sequence, allowed up to 1 -> why no further.
SPLITTING = {
    "context_parallel_size": OF_A_RANK,
    "sequence_parallel_degree": OF_A_RANK,
    "tensor_parallel_size": "",
    "expert_parallel_size": ": axolotl joins the experts of all ranks in a checkpoint "
    "of supervised training only",
}
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
BETA_KEYS = ("beta", "rl_beta", "dpo_beta", "trl.beta")


def check_recipe(recipe: Mapping[str, Any]) -> float | None:
    """Refuses a recipe with `rl: edpo` that would not train as written.

    Args:
        recipe: The YAML with command-line overrides, not yet validated.

    Returns:
        The initial β, or None where the recipe leaves it to TRL's default.

    Raises:
        ValueError: One line with key, value and what to set.
    """
    recipe = {**recipe, **lowered_packing(recipe)}
    _check_sections(recipe)
    check_own_keys(recipe)
    beta = _common_beta(recipe)
    own = {key: recipe[key] for key in EDPOArgs.model_fields if key in recipe}
    own = {key: value for key, value in own.items() if value is not None}
    _check_values({**own, "beta": beta})
    recipe |= _check_values(recipe, model=Bounds)
    _check_control(recipe, beta)
    _check_trace(recipe)
    _check_unsupported(recipe)
    _check_loss(recipe)
    check_entries(recipe)
    _check_precision(recipe)
    _check_adapter(recipe)
    _check_moving(recipe)
    _check_cache(recipe)
    _check_ignored(recipe)
    _check_kernels(recipe)
    _check_qat(recipe)
    _check_sharing(recipe)
    _check_fsdp(recipe)
    _check_ray(recipe)
    _check_new_adapter(recipe)
    _check_files(recipe)
    return None if beta is None else float(beta)


def without_effect(recipe: Mapping[str, Any]) -> list[str]:
    """A line for each key that does nothing, and without which nothing is lost."""
    return [
        f"`{key}: {recipe[key]}` has no effect beside `rl`: {instead}."
        for key, instead in WITHOUT_EFFECT.items()
        if recipe.get(key)
    ]


def check_without_gpu(recipe: Mapping[str, Any]) -> None:
    """Refuses what the machine cannot do, in a recipe for a machine without a GPU.

    Args:
        recipe: The recipe, validated: there `bf16: auto` is decided.

    Raises:
        ValueError: Names the first such key.
    """
    for key, remedy in NEEDS_GPU.items():
        if recipe.get(key):
            raise ValueError(f"`{key}: {recipe[key]}` needs a GPU: {remedy}")


def check_foreign_recipe(recipe: Mapping[str, Any]) -> None:
    """Refuses our keys in a recipe of another `rl`, where they would do nothing.

    Raises:
        ValueError: Names the first such key.
    """
    for key in recipe:
        if str(key).startswith(PREFIX) and recipe[key] is not None:
            raise ValueError(
                f"`{key}: {recipe[key]}` has no effect with `rl: {recipe.get('rl')}`: "
                f"set `rl: edpo`, or remove `{key}`"
            )


def _check_sections(recipe: Mapping[str, Any]) -> None:
    for key in SECTIONS:
        if (value := recipe.get(key)) and not isinstance(value, Mapping):
            raise ValueError(f"`{key}: {value}`: lines with keys of its own are due")


def _common_beta(recipe: Mapping[str, Any]) -> Any:
    """The one value of all keys that mean β; two that disagree are refused."""
    trl = recipe.get("trl") or {}
    values = {key: recipe.get(key) for key in BETA_KEYS if "." not in key}
    values["trl.beta"] = trl.get("beta")
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        _check_values({"beta": value}, name=key)
    for key, value in list(given.items())[1:]:
        first = next(iter(given))
        if float(value) != float(given[first]):
            raise ValueError(
                f"`{first}: {given[first]}` and `{key}: {value}` both set the initial "
                "KL penalty and disagree: keep one of them"
            )
    return next(iter(given.values()), None)


def _check_values(
    values: Mapping[str, Any],
    name: str | None = None,
    above: str = "",
    model: type[BaseModel] = EDPOArgs,
) -> dict[str, Any]:
    """Validates options, and returns them; pydantic's report becomes one line."""
    try:
        return model.model_validate(dict(values)).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        description = model.model_fields[key].description
        written = {lowered: key for key, lowered in LOWERED.items()}.get(key, key)
        raise ValueError(
            f"`{name or above + written}: {first['input']}`: {first['msg']}. "
            f"{description}."
        ) from None


def _check_control(recipe: Mapping[str, Any], beta: Any) -> None:
    """Keys of another `edpo_control`, and what β-DPO does not go with."""
    control = recipe.get(CONTROL) or "epsilon"
    written = recipe.get("rl") != "dpo"  # else lowered before: all defaults are in it
    for key, owner in OF_CONTROL.items():
        if written and recipe.get(key) is not None and owner != control:
            remedy = f"remove it: it has no effect beside `{CONTROL}: {control}`"
            refuse(key, recipe[key], remedy)
    if control != "batch_margin":
        return
    if beta is not None and float(beta) < LOWEST_BATCH_BETA:
        remedy = f"set {LOWEST_BATCH_BETA} or more: β-DPO lets β fall no further"
        refuse("beta", beta, remedy)
    filtered = (recipe.get("edpo_margin_keep") or 1) < 1
    if filtered and SFT in (recipe.get("dpo_loss_type") or ()):
        remedy = "remove it, or `sft`, which is a mean over tokens, not over pairs"
        refuse("edpo_margin_keep", recipe["edpo_margin_keep"], remedy)


def _check_trace(recipe: Mapping[str, Any]) -> None:
    """Texts of pairs stay on the machine."""
    hub = recipe.get("hub_model_id")
    if recipe.get("edpo_log_pairs") and hub:
        remedy = f"remove it, or `hub_model_id: {hub}`: everything in `output_dir` is "
        remedy += "uploaded there, and it would hold the texts of your pairs"
        refuse("edpo_log_pairs", recipe["edpo_log_pairs"], remedy)


def _check_unsupported(recipe: Mapping[str, Any]) -> None:
    for key, remedy in UNSUPPORTED.items():
        if recipe.get(key):
            refuse(key, recipe[key], remedy)
    for key, why in SPLITTING.items():
        if (recipe.get(key) or 1) > 1:
            refuse(key, recipe[key], f"set `{key}: 1`{why}")
    _check_context(recipe)
    if (recipe.get("accelerator_config") or {}).get("dispatch_batches"):
        remedy = "remove it: pairs are handed over before they are tensors"
        refuse("accelerator_config.dispatch_batches", True, remedy)


def _check_context(recipe: Mapping[str, Any]) -> None:
    """The other spelling of `context_parallel_size`."""
    name, block = "context_parallel.size", recipe.get("context_parallel") or {}
    given = {"context_parallel_size": block.get("size")}
    for size in _check_values(given, name, model=Bounds).values():
        if size > 1:
            refuse(name, size, f"set 1{OF_A_RANK}")


def _check_loss(recipe: Mapping[str, Any]) -> None:
    types = recipe.get("dpo_loss_type") or ["sigmoid"]
    LossSettings(
        tuple(types),
        tuple(recipe.get("dpo_loss_weights") or [1.0] * len(types)),
        recipe.get("dpo_label_smoothing") or 0.0,
        bool(recipe.get("dpo_use_weighting")),
    )


def _check_precision(recipe: Mapping[str, Any]) -> None:
    if recipe.get("bf16") is True and recipe.get("fp16") is True:
        refuse("fp16", True, "remove it, or `bf16: true`: they exclude each other")


def _check_files(recipe: Mapping[str, Any]) -> None:
    """Files that would be missed after the model is loaded, or not at all."""
    for key, (file, remedy) in FILES.items():
        value = recipe.get(key)
        if isinstance(value, str) and _is_path(key, value):
            path = Path(value) / file
            if not path.exists():
                raise ValueError(f"`{key}: {value}`: there is no {path}; {remedy}")


def _is_path(key: str, value: str) -> bool:
    """Whether it can only be a path: not the name of a model on a hub, no template."""
    if key == "chat_template_jinja":
        return "{" not in value
    named = key in ("base_model", "lora_model_dir")
    return not named or value.startswith(("/", ".", "~")) or value.count("/") > 1


def _check_adapter(recipe: Mapping[str, Any]) -> None:
    """The reference of an adapter is the model with the adapter off."""
    start = recipe.get("peft_init_lora_weights")
    if start not in (None, True, "gaussian"):
        remedy = "remove it: with the adapter off, the model must be `base_model`"
        refuse("peft_init_lora_weights", start, remedy)
    if ((recipe.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits"):
        refuse("peft.loftq_config", "set", "remove it, as it changes `base_model`")
    directory = recipe.get("lora_model_dir")
    if directory and not recipe.get("adapter"):
        remedy = "set `adapter: lora` or `adapter: qlora`"
        refuse("lora_model_dir", directory, remedy)
    if directory and recipe.get("rl_adapter_ref_model"):
        remedy = "remove it: the reference of `lora_model_dir` is its own start"
        refuse("rl_adapter_ref_model", True, remedy)


def _check_moving(recipe: Mapping[str, Any]) -> None:
    """A reference that follows the policy is a model of its own."""
    moving = _check_values(recipe.get("trl") or {}, above="trl.", model=Moving)
    if moving.get("sync_ref_model") and recipe.get("adapter"):
        remedy = "remove it: the reference is the policy without its adapter"
        refuse("trl.sync_ref_model", True, remedy)


def _check_cache(recipe: Mapping[str, Any]) -> None:
    """A cache is of a reference that stays as it is."""
    precompute, folder = map(recipe.get, (PRECOMPUTE, CACHE))
    if precompute not in (None, True, False):
        raise ValueError(f"`{PRECOMPUTE}: {precompute}`: true or false")
    if precompute and (recipe.get("trl") or {}).get("sync_ref_model"):
        remedy = "remove it, or `trl.sync_ref_model`: a reference that moves has no "
        refuse(PRECOMPUTE, True, remedy + "hidden states to keep")
    rows = [name for name in recipe.get("unfrozen_parameters") or () if "$[" in name]
    if precompute and rows:
        remedy = f"remove it, or rows from `unfrozen_parameters: {rows[0]}`: a pair "
        remedy += "without these tokens would differ from its cache by rounding only"
        refuse(PRECOMPUTE, True, remedy)
    if folder and not precompute:
        remedy = f"set `{PRECOMPUTE}: true` beside it, or remove it"
        refuse(CACHE, folder, remedy)
    place = Path(folder or ".").expanduser()
    if place.exists() and not place.is_dir():
        refuse(CACHE, folder, "name a folder: this is a file")


def _check_ignored(recipe: Mapping[str, Any]) -> None:
    """Refuses adapter options that axolotl accepts beside `rl` and then ignores."""
    adapter = recipe.get("adapter")
    if adapter == "llama-adapter":
        remedy = "set `adapter: lora`: axolotl has no keys for its size"
        refuse("adapter", adapter, remedy)
    if adapter == "lora" and recipe.get("load_in_4bit"):
        remedy = "set `adapter: qlora`: with `lora` nothing is quantized to 4 bits"
        refuse("load_in_4bit", True, remedy)
    unfrozen = recipe.get("unfrozen_parameters")
    if adapter and unfrozen:
        remedy = "remove it: below an adapter nothing trains but `lora_modules_to_save`"
        refuse("unfrozen_parameters", unfrozen, remedy)
    if recipe.get("peft_autocast_adapter_dtype") is False:
        remedy = "remove it: axolotl does not hand it on beside `rl`"
        refuse("peft_autocast_adapter_dtype", False, remedy)


def _check_kernels(recipe: Mapping[str, Any]) -> None:
    why = "axolotl looks for an adapter that the trainer of preferences adds later"
    if patches_adapters_late():
        why = "whether the reference, which has the adapter off, is then the plain "
        why += "model has not been tested yet"
    for key in KERNELS:
        if recipe.get(key):
            refuse(key, recipe[key], f"remove it: {why}")


def _check_qat(recipe: Mapping[str, Any]) -> None:
    steps = (recipe.get("qat") or {}).get("fake_quant_after_n_steps")
    if steps:
        remedy = "remove it: the reference is quantized from the start"
        refuse("qat.fake_quant_after_n_steps", steps, remedy)


def _check_new_adapter(recipe: Mapping[str, Any]) -> None:
    """What an adapter cannot begin without."""
    if recipe.get("adapter") not in ("lora", "qlora") or recipe.get("lora_model_dir"):
        return
    targets = ("lora_target_linear", "lora_target_modules", "lora_target_parameters")
    if not recipe.get("lora_r"):
        raise ValueError("`lora_r` is not set: set the adapter's rank, as `lora_r: 16`")
    if not any(map(recipe.get, targets)):
        raise ValueError(
            "`lora_target_modules` is not set: name the layers to adapt, or set "
            "`lora_target_linear: true` for all"
        )


def _check_sharing(recipe: Mapping[str, Any]) -> None:
    packing = ("dpo_padding_free", *LOWERED.values())
    if recipe.get("edpo_prefix_sharing") is True and not any(map(recipe.get, packing)):
        remedy = "set `sample_packing: true` or `dpo_padding_free: true`: padded, each "
        remedy += "sequence has a row of its own"
        refuse("edpo_prefix_sharing", True, remedy)


def _check_fsdp(recipe: Mapping[str, Any]) -> None:
    options = recipe.get("fsdp_config")
    if not options:
        return
    own = options.get("fsdp_version") or options.get("version")
    version = recipe.get("fsdp_version") or own or default_fsdp_version()
    if str(version) != "2":
        remedy = "set `fsdp_version: 2`: FSDP 1 flattens the head that is read"
        refuse("fsdp_version", version, remedy)
    saved = recipe.get("lora_modules_to_save")
    if saved and recipe.get("adapter"):
        remedy = "remove it or use `deepspeed:`: axolotl cannot save it under FSDP2"
        refuse("lora_modules_to_save", saved, remedy)


def _check_ray(recipe: Mapping[str, Any]) -> None:
    """axolotl's driver counts the steps of one worker, unless it knows of more."""
    workers = recipe.get("ray_num_workers") or 1
    counted = any(map(recipe.get, ("ddp", "fsdp_config", "max_steps")))
    if recipe.get("use_ray") and workers > 1 and not counted:
        remedy = f"set `ddp: true`, or axolotl trains {workers} times `num_epochs`"
        refuse("ray_num_workers", workers, remedy)
