"""The options of a recipe: fields, bounds, cross-checks.

`EDPOArgs` is the single place where an option is defined; axolotl merges it into its
config. `check_recipe` looks at the YAML before axolotl validates it and refuses what
would not train as written, in one line that names key, value and remedy.
"""

import difflib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from .loss import BetaMean

PREFIX = "edpo_"
BETA_KEYS = ("beta", "rl_beta", "dpo_beta", "trl.beta")

# Recipe keys that would change the loss or the batch in a way this version does not
# compute: key -> what to set instead.
UNSUPPORTED = {
    "dpo_use_weighting": "remove it, or use `rl: dpo` for WPO weights",
    "dpo_use_liger_kernel": "remove it: the head already runs without full logits",
    "precompute_ref_log_probs": "remove it: ε-DPO needs the reference's logits over "
    "the whole vocabulary, not two log-probabilities",
    "reference_free": "remove it: ε-DPO compares policy and reference",
    "dpo_norm_loss": "remove it",
    "fsdp": "set `fsdp_version: 2` and `fsdp_config:`",
    "is_multimodal": "use a text model, or `rl: dpo`",
    "processor_type": "use a text model, or `rl: dpo`",
    "orpo_alpha": "remove it: axolotl would take it for `beta`",
    "reward_model": "remove it: it asks for another trainer",
    "process_reward_model": "remove it: it asks for another trainer",
}
# Keys that axolotl refuses beside `rl` -> what they become.
LOWERED = {
    "sample_packing": "edpo_sample_packing",
    "eval_sample_packing": "edpo_eval_sample_packing",
}
# Keys that name a file, or a directory: a file in it, and a remedy.
FILES = {
    "base_model": ("config.json", "name a folder with a model, or one on the hub"),
    "lora_model_dir": ("adapter_config.json", "name the folder of a saved adapter"),
    "resume_from_checkpoint": ("", "name a checkpoint, or remove it to start anew"),
    "deepspeed": ("", "`axolotl fetch deepspeed_configs` gets those of axolotl"),
    "chat_template_jinja": ("", "a template would have `{`, this is taken for a file"),
}
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


class EDPOArgs(BaseModel):
    """Options that `axolotl_edpo.EDPOPlugin` adds to a recipe."""

    beta: Number | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
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


class Numbers(BaseModel):
    """axolotl's own numbers that it takes as they are, in the bounds that train."""

    learning_rate: Number | None = Field(None, ge=0, description="Of the optimizer")
    num_epochs: Number | None = Field(None, gt=0, description="Times over the data")
    micro_batch_size: int | None = Field(None, gt=0, description="Pairs at once")
    gradient_accumulation_steps: int | None = Field(
        None, gt=0, description="Micro-batches of an optimizer step"
    )
    sequence_len: int | None = Field(
        None, gt=0, description="Tokens of a prompt and an answer, at most"
    )
    val_set_size: Number | None = Field(
        None, ge=0, description="Share of the pairs that evaluate, or their number"
    )
    logging_steps: Number | None = Field(None, gt=0, description="Steps between logs")
    save_steps: Number | None = Field(None, ge=0, description="Steps between saves")
    lora_r: int | None = Field(None, gt=0, description="Rank of the adapter")
    lora_dropout: Number | None = Field(
        None, ge=0, le=1, description="Probability of the adapter's dropout"
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
    _check_values(recipe, model=Numbers)
    _check_unsupported(recipe)
    _check_precision(recipe)
    _check_adapter(recipe)
    _check_sharing(recipe)
    _check_fsdp(recipe)
    _check_ray(recipe)
    _check_new_adapter(recipe)
    _check_datasets(recipe)
    _check_files(recipe)
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


def misspelt(recipe: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Finds keys that axolotl would ignore and that are nearly a key it knows.

    Args:
        recipe: The YAML, not yet validated.
        known: All keys of axolotl and of the recipe's plugins. Keys that begin with
            `_` or `x-` are nobody's: they hold YAML anchors.

    Returns:
        A line for each key that could be another one, misspelt.

    Raises:
        ValueError: If a key is certainly another one: a single letter is missing, too
            many or wrong, or two are swapped, and that other one is not there itself.
    """
    lines = []
    for key in map(str, recipe):
        if key in known or key.startswith(("_", "x-")):
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if not near:
            continue
        if _one_slip(key, near[0]) and near[0] not in recipe:
            raise ValueError(
                f"`{key}: {recipe[key]}` is not an option of axolotl: did you mean "
                f"`{near[0]}`?"
            )
        lines.append(
            f"`{key}: {recipe[key]}` is not an option of axolotl and has no effect: "
            f"did you mean `{near[0]}`?"
        )
    return lines


def _one_slip(a: str, b: str) -> bool:
    """Whether two different words differ by one letter, or by two that are swapped."""
    a, b = (word.lower().replace("-", "_") for word in (a, b))
    same = len(os.path.commonprefix([a, b]))
    a, b = a[same:], b[same:]
    swapped = a[:2] == b[1::-1] and a[2:] == b[2:]
    return swapped or a[1:] in (b, b[1:]) or a == b[1:]


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


def _check_values(
    values: Mapping[str, Any],
    name: str | None = None,
    model: type[BaseModel] = EDPOArgs,
) -> None:
    """Validates options; pydantic's report becomes one line."""
    try:
        model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        description = model.model_fields[key].description
        written = {lowered: key for key, lowered in LOWERED.items()}.get(key, key)
        raise ValueError(
            f"`{name or written}: {first['input']}`: {first['msg']}. {description}."
        ) from None


def _check_unsupported(recipe: Mapping[str, Any]) -> None:
    for key, remedy in UNSUPPORTED.items():
        if recipe.get(key):
            _refuse(key, recipe[key], remedy)
    for key in SPLITTING:
        if (recipe.get(key) or 1) > 1:
            _refuse(key, recipe[key], f"set `{key}: 1`")
    if (recipe.get("accelerator_config") or {}).get("dispatch_batches"):
        remedy = "remove it: pairs are handed over before they are tensors"
        _refuse("accelerator_config.dispatch_batches", True, remedy)
    losses = recipe.get("dpo_loss_type")
    if losses and losses != "sigmoid" and list(losses) != ["sigmoid"]:
        _refuse("dpo_loss_type", losses, "remove it: ε-DPO is the sigmoid loss")
    smoothing = recipe.get("dpo_label_smoothing") or 0
    if not 0 <= float(smoothing) < 0.5:
        _refuse("dpo_label_smoothing", smoothing, "set a value from 0 to below 0.5")


def _check_precision(recipe: Mapping[str, Any]) -> None:
    if recipe.get("bf16") is True and recipe.get("fp16") is True:
        _refuse("fp16", True, "remove it, or `bf16: true`: they exclude each other")


def _check_datasets(recipe: Mapping[str, Any]) -> None:
    """What axolotl meets with an error of Python's, or of a library's."""
    for key in ("datasets", "test_datasets"):
        entries = recipe.get(key) or []
        if isinstance(entries, str | Mapping):
            raise ValueError(f"`{key}: {entries}`: a list of entries `- path:` is due")
        for entry in entries:
            path = entry.get("path") if isinstance(entry, Mapping) else None
            if not path:
                raise ValueError(f"`{key}`: `{entry}` has no `path:`; every entry does")
            if os.path.isfile(path) and not os.path.getsize(path):
                raise ValueError(f"`{key}`: `path: {path}` is an empty file")


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
        _refuse("peft_init_lora_weights", start, remedy)
    if ((recipe.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits"):
        _refuse("peft.loftq_config", "set", "remove it, as it changes `base_model`")
    directory = recipe.get("lora_model_dir")
    if directory and not recipe.get("adapter"):
        remedy = "set `adapter: lora` or `adapter: qlora`"
        _refuse("lora_model_dir", directory, remedy)
    if directory and recipe.get("rl_adapter_ref_model"):
        remedy = "remove it: the reference of `lora_model_dir` is its own start"
        _refuse("rl_adapter_ref_model", True, remedy)


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
        _refuse("edpo_prefix_sharing", True, remedy)


def _check_fsdp(recipe: Mapping[str, Any]) -> None:
    options = recipe.get("fsdp_config")
    if not options:
        return
    own = options.get("fsdp_version") or options.get("version")
    version = recipe.get("fsdp_version") or own or 1
    if int(version) != 2:
        remedy = "set `fsdp_version: 2`: FSDP 1 flattens the head that is read"
        _refuse("fsdp_version", version, remedy)
    saved = recipe.get("lora_modules_to_save")
    if saved and recipe.get("adapter"):
        remedy = "remove it or use `deepspeed:`: axolotl cannot save it under FSDP2"
        _refuse("lora_modules_to_save", saved, remedy)


def _check_ray(recipe: Mapping[str, Any]) -> None:
    """axolotl's driver counts the steps of one worker, unless it knows of more."""
    workers = recipe.get("ray_num_workers") or 1
    counted = any(map(recipe.get, ("ddp", "fsdp_config", "max_steps")))
    if recipe.get("use_ray") and workers > 1 and not counted:
        remedy = f"set `ddp: true`, or axolotl trains {workers} times `num_epochs`"
        _refuse("ray_num_workers", workers, remedy)


def _refuse(key: str, value: Any, remedy: str) -> None:
    raise ValueError(f"`{key}: {value}` does not work with `rl: edpo`: {remedy}")
