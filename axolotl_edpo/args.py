"""The options of a recipe: fields, bounds, cross-checks.

`EDPOArgs` is the single place where an option is defined; axolotl merges it into its
config. `check_recipe` looks at the YAML before axolotl validates it and refuses what
would not train as written, in one line that names key, value and remedy.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from .errors import refuse
from .loss import BetaMean
from .loss_types import LossSettings

PREFIX = "edpo_"
BETA_KEYS = ("beta", "rl_beta", "dpo_beta", "trl.beta")

SUPERVISED = "remove it: axolotl gives it to supervised training only"
# Recipe keys that would change the loss or the batch in a way this version does not
# compute, or that would do nothing: key -> what to set instead.
UNSUPPORTED = {
    "precompute_ref_log_probs": "remove it: ε-DPO needs the reference's logits over "
    "the whole vocabulary, not two log-probabilities",
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
    "lora_mlp_kernel": "remove it: axolotl looks for an adapter that the trainer of "
    "preferences adds later",
    "lora_qkv_kernel": "remove it, as `lora_mlp_kernel`",
    "lora_o_kernel": "remove it, as `lora_mlp_kernel`",
    "neftune_noise_alpha": "remove it: its noise would count as distance from the "
    "reference",
    "noisy_embedding_alpha": "remove it: its noise would count as distance from the "
    "reference",
    "group_by_length": "set `sample_packing: true`, which needs no padding at all",
    "auto_find_batch_size": "set `micro_batch_size` to what fits",
    "relora": SUPERVISED,
    "lisa_step_interval": SUPERVISED,
    "layer_offloading": SUPERVISED,
    "do_bench_eval": SUPERVISED,
    "do_causal_lm_eval": SUPERVISED,
    "generate_samples": SUPERVISED,
}
# Options of an entry of `datasets:` that axolotl ignores beside `rl`, though they would
# change the pairs -> what to do instead. Those before `shards` are of chat templates.
IGNORED = {
    "chat_template": "set it for the whole recipe",
    "chat_template_jinja": "set it for the whole recipe",
    "message_property_mappings": "name them `role` and `content` in the data",
    "message_field_role": "name it `role` in the data",
    "message_field_content": "name it `content` in the data",
    "roles": "name them `system`, `user`, `assistant` and `tool` in the data",
    "shards": "set `split: train[:10%]`",
    "preprocess_shards": "remove it",
}
# Options of chat templates that axolotl does read -> their defaults.
FIELDS = {
    "field_messages": "messages",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
# What only a GPU can do -> what to set where there is none.
NEEDS_GPU = {
    "fp16": "set `bf16: true` (`auto` becomes fp16)",
    "float16": "set `bf16: true`",
    "activation_offloading": "remove it",
    "profiler_steps": "remove it",
}
# Keys that axolotl gives to supervised training only, though TRL's trainer takes them.
HANDED_ON = (
    "metric_for_best_model",
    "greater_is_better",
    "lr_quadratic_warmup",
    "jagged_restart_steps",
    "jagged_restart_warmup_steps",
    "jagged_restart_anneal_steps",
)
# Keys that axolotl refuses beside `rl` -> what they become.
LOWERED = {
    "sample_packing": "edpo_sample_packing",
    "eval_sample_packing": "edpo_eval_sample_packing",
}
# A head of its own, which ours takes the place of.
LIGER = "dpo_use_liger_kernel"
# Keys of `trl:` that let the reference follow the policy (TR-DPO).
MOVING = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
# Keys that split a model or a sequence: allowed up to 1.
SPLITTING = (
    "context_parallel_size",
    "sequence_parallel_degree",
    "tensor_parallel_size",
)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false, is needed")
    return value


def _switch(value: Any) -> Any:
    if value not in (True, False, "auto"):
        raise ValueError("true, false or auto is needed")
    return value


Switch = Annotated[bool | Literal["auto"], BeforeValidator(_switch)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool)]


class EDPOArgs(BaseModel):
    """Options that `axolotl_edpo.EDPOPlugin` adds to a recipe."""

    beta: Positive | None = Field(
        default=None,
        description="Initial KL penalty β > 0; `rl_beta` means the same (absent: 0.1)",
    )
    edpo_epsilon: Number = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Perturbation ε of the KL penalty, between 0 and 1 (paper: 0.01)",
    )
    edpo_beta_mean: BetaMean = Field(
        default="arithmetic",
        description="Mean of the pairs' β that is the next step's β: `arithmetic` "
        "(the paper's Eq. 6) or `harmonic` (the authors' released code)",
    )
    edpo_prefix_sharing: Switch = Field(
        default="auto",
        description="Whether a prompt is in a packed row once, for chosen and rejected "
        "(`auto`: where pairs are packed or padding-free and the model can)",
    )
    edpo_sample_packing: Switch = Field(
        default=False,
        description="What `sample_packing` becomes, which axolotl refuses beside `rl`: "
        "one row per micro-batch, pairs of a step dealt evenly by tokens (`auto`: "
        "padded, where the model cannot)",
    )
    edpo_eval_sample_packing: bool | None = Field(
        default=None,
        description="What `eval_sample_packing` becomes (absent: as in training)",
    )


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
    _check_unknown(recipe)
    beta = _common_beta(recipe)
    own = {key: recipe[key] for key in EDPOArgs.model_fields if key in recipe}
    own = {key: value for key, value in own.items() if value is not None}
    _check_values({**own, "beta": beta})
    _check_unsupported(recipe)
    _check_loss(recipe)
    _check_datasets(recipe)
    _check_test_datasets(recipe)
    _check_adapter(recipe)
    _check_moving(recipe)
    _check_ignored(recipe)
    _check_qat(recipe)
    _check_sharing(recipe)
    _check_fsdp(recipe)
    _check_ray(recipe)
    return None if beta is None else float(beta)


def lowered_packing(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The packing keys of a recipe under the names they get.

    Args:
        recipe: The YAML; None is as good as absent.
    """
    lowered = {
        name: recipe[key]
        for key, name in LOWERED.items()
        if recipe.get(key) is not None
    }
    for key, name in LOWERED.items():
        given = recipe.get(name)
        if name in lowered and given not in (None, lowered[name]):
            raise ValueError(
                f"`{key}: {lowered[name]}` and `{name}: {given}` mean the same and "
                f"disagree: remove `{name}`"
            )
    return lowered


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


def handed_on(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments that axolotl leaves out of preference training.

    Args:
        recipe: The recipe, validated.
    """
    told = {key: recipe[key] for key in HANDED_ON if recipe.get(key) is not None}
    best = recipe.get("load_best_model_at_end") or recipe.get("early_stopping_patience")
    if best:
        told["load_best_model_at_end"] = True
    if (trl := recipe.get("trl")) and trl.get("sync_ref_model"):
        told |= {key: trl[key] for key in MOVING if trl.get(key) is not None}
    if recipe.get("curriculum_sampling"):
        told["train_sampling_strategy"] = "sequential"
    return told


def check_foreign_recipe(recipe: Mapping[str, Any]) -> None:
    """Refuses our keys in a recipe of another `rl`, where they would do nothing.

    Raises:
        ValueError: Names the first such key.
    """
    for key in recipe:
        if str(key).startswith(PREFIX):
            raise ValueError(
                f"`{key}: {recipe[key]}` has no effect with `rl: {recipe.get('rl')}`: "
                f"set `rl: edpo`, or remove `{key}`"
            )


def _check_unknown(recipe: Mapping[str, Any]) -> None:
    known = [key for key in EDPOArgs.model_fields if key.startswith(PREFIX)]
    for key in recipe:
        if str(key).startswith(PREFIX) and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"`{key}: {recipe[key]}` is not an option of `rl: edpo`: "
                f"did you mean `{near}`?"
            )


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


def _check_values(values: Mapping[str, Any], name: str | None = None) -> None:
    """Validates options; pydantic's report becomes one line."""
    try:
        EDPOArgs.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        description = EDPOArgs.model_fields[key].description
        written = {lowered: key for key, lowered in LOWERED.items()}.get(key, key)
        raise ValueError(
            f"`{name or written}: {first['input']}`: {first['msg']}. {description}."
        ) from None


def _check_unsupported(recipe: Mapping[str, Any]) -> None:
    for key, remedy in UNSUPPORTED.items():
        if recipe.get(key):
            refuse(key, recipe[key], remedy)
    for key in SPLITTING:
        if (recipe.get(key) or 1) > 1:
            refuse(key, recipe[key], f"set `{key}: 1`")
    if (recipe.get("accelerator_config") or {}).get("dispatch_batches"):
        remedy = "remove it: pairs are handed over before they are tensors"
        refuse("accelerator_config.dispatch_batches", True, remedy)


def _check_loss(recipe: Mapping[str, Any]) -> None:
    types = recipe.get("dpo_loss_type") or ["sigmoid"]
    types = [types] if isinstance(types, str) else types
    weights = recipe.get("dpo_loss_weights") or [1.0] * len(types)
    LossSettings(
        tuple(types),
        tuple(float(weight) for weight in weights),
        float(recipe.get("dpo_label_smoothing") or 0),
        bool(recipe.get("dpo_use_weighting")),
    )


def _check_datasets(recipe: Mapping[str, Any]) -> None:
    for name in ("datasets", "test_datasets"):
        for entry in _entries(recipe, name):
            for key, remedy in IGNORED.items():
                if entry.get(key) and not _is_default(key, entry, recipe):
                    refuse(f"{name}: {key}", entry[key], f"it is ignored, {remedy}")


def _entries(recipe: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The entries of `datasets:`; what is none is left to axolotl's validation."""
    return [entry for entry in recipe.get(name) or [] if isinstance(entry, Mapping)]


def _is_default(key: str, entry: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether axolotl does the same without this option."""
    value = entry[key]
    if "shards" in key:
        return False
    if not _has_chat_template(entry):
        return True
    if key == "roles":
        return all(role in names for role, names in value.items())
    if key == "message_property_mappings":
        return all(value.get(name, name) == name for name in ("role", "content"))
    default = "tokenizer_default" if key == "chat_template" else key.split("_")[-1]
    return value == (recipe.get(key) or default)


def _has_chat_template(entry: Mapping[str, Any]) -> bool:
    return str(entry.get("type")).startswith("chat_template")


def _check_test_datasets(recipe: Mapping[str, Any]) -> None:
    """axolotl reads an entry's options from the entry of `datasets:` at its place."""
    trained = _entries(recipe, "datasets")
    for place, entry in enumerate(_entries(recipe, "test_datasets")):
        read: Mapping[str, Any] = trained[place] if place < len(trained) else {}
        options = FIELDS if _has_chat_template(entry) else {}
        if isinstance(entry.get("type"), Mapping):
            options = {"type": ""}
        for key, default in options.items():
            if (entry.get(key) or default) != (read.get(key) or default):
                remedy = "it is taken from the entry of `datasets:` at its place"
                refuse(f"test_datasets: {key}", entry.get(key), remedy)


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
    sync, mixup, every = ((recipe.get("trl") or {}).get(key) for key in MOVING)
    if not sync:
        return
    if recipe.get("adapter"):
        remedy = "remove it: the reference is the policy without its adapter"
        refuse("trl.sync_ref_model", sync, remedy)
    if mixup is not None and not 0 < mixup <= 1:
        refuse("trl.ref_model_mixup_alpha", mixup, "set a number above 0, up to 1")
    if every is not None and every < 1:
        refuse("trl.ref_model_sync_steps", every, "set a number of steps, at least 1")


def _check_ignored(recipe: Mapping[str, Any]) -> None:
    """What axolotl 0.19 takes beside `adapter` and `rl`, and then does not do."""
    adapter = recipe.get("adapter")
    if adapter == "llama-adapter":
        remedy = "set `adapter: lora`: axolotl 0.19 has no keys for its size"
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


def _check_qat(recipe: Mapping[str, Any]) -> None:
    steps = (recipe.get("qat") or {}).get("fake_quant_after_n_steps")
    if steps:
        remedy = "remove it: the reference is quantized from the start"
        refuse("qat.fake_quant_after_n_steps", steps, remedy)


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
    version = recipe.get("fsdp_version") or own or 1
    if int(version) != 2:
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
