"""Refuses a recipe that would not train as written, before a model is loaded.

The message is one line with key, value and remedy. Most checks are tables in
`rules.py`. This file has the other checks, and the order of all.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import quote, refuse
from ..losses.preference import PreferenceLoss
from ..upstream import default_fsdp_version
from . import rules
from .args import LOWERED, PREFIX, Bounds, EDPOArgs, Moving, lowered_packing
from .context_rules import SIZE, check_context
from .dataset_entries import check_entries
from .lora_kernels import KERNEL_RULES
from .loss_rules import LOSS_RULES
from .rules import Recipe
from .typos import check_edpo_keys


def check_recipe(recipe: Recipe) -> float | None:
    """Refuses a recipe with `rl: edpo` that would not train as written.

    Args:
        recipe: The YAML with command-line overrides, not yet validated.

    Returns:
        The initial β, or None if the recipe sets none: TRL's default then holds.

    Raises:
        ValueError: One line with key, value and what to set.
    """
    recipe = {**recipe, **lowered_packing(recipe)}
    _check_sections(recipe)
    check_edpo_keys(recipe)
    recipe["beta"] = _common_beta(recipe)
    options = {key: recipe.get(key) for key in EDPOArgs.model_fields}
    options = {key: value for key, value in options.items() if value is not None}
    _validated(EDPOArgs, options)
    recipe |= _validated(Bounds, recipe)
    for check in CHECKS:
        check(recipe)
    return None if recipe["beta"] is None else float(recipe["beta"])


def without_effect(recipe: Recipe) -> list[str]:
    """A warning for each key without effect that can be ignored safely."""
    return [
        f"{quote(key, recipe[key])} has no effect beside `rl`: {instead}."
        for key, instead in rules.WITHOUT_EFFECT.items()
        if recipe.get(key)
    ]


def check_without_gpu(recipe: Recipe) -> None:
    """Refuses keys that need a GPU; called on a machine without one.

    Args:
        recipe: The validated recipe, in which `bf16: auto` is already resolved.

    Raises:
        ValueError: Names the first such key.
    """
    for key, remedy in rules.NEEDS_GPU.items():
        if recipe.get(key):
            raise ValueError(f"{quote(key, recipe[key])} needs a GPU: {remedy}")


def check_foreign_recipe(recipe: Recipe) -> None:
    """Refuses our keys in a recipe with another `rl`, where they have no effect.

    Raises:
        ValueError: Names the first such key.
    """
    for key in recipe:
        if str(key).startswith(PREFIX) and recipe[key] is not None:
            raise ValueError(
                f"{quote(key, recipe[key])} has no effect with "
                f"{quote('rl', recipe.get('rl'))}: set `rl: edpo`, or remove `{key}`"
            )


def _validated(
    model: type[BaseModel],
    values: Mapping[str, Any],
    name: str | None = None,
    section: str = "",
) -> dict[str, Any]:
    """Validates options by a pydantic model.

    Args:
        model: The model, which holds bounds and descriptions of the options.
        values: Option -> value; options that the model lacks are ignored.
        name: The key that the message names; by default the option itself.
        section: Prefix of that key in the message, such as `trl.`.

    Returns:
        Option -> parsed value, without options that are None.

    Raises:
        ValueError: One line about the first wrong value.
    """
    try:
        return model.model_validate(dict(values)).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        description = model.model_fields[option].description
        written = {lowered: key for key, lowered in LOWERED.items()}.get(option, option)
        quoted = quote(name or section + written, first["input"])
        raise ValueError(f"{quoted}: {first['msg']}. {description}.") from None


def _check_sections(recipe: Recipe) -> None:
    for key in rules.SECTIONS:
        if (value := recipe.get(key)) and not isinstance(value, Mapping):
            line = f"{quote(key, value)}: lines with keys of its own are due"
            raise ValueError(line)


def _common_beta(recipe: Recipe) -> Any:
    """The value of the keys that set β, or None; refuses keys that disagree."""
    values = {key: rules.value_at(recipe, key) for key in rules.BETA_KEYS}
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        _validated(EDPOArgs, {"beta": value}, name=key)
    for key, value in list(given.items())[1:]:
        first = next(iter(given))
        if float(value) != float(given[first]):
            raise ValueError(
                f"{quote(first, given[first])} and {quote(key, value)} both set the "
                "initial KL penalty and disagree: keep one of them"
            )
    return next(iter(given.values()), None)


def _check_context(recipe: Recipe) -> None:
    key = "context_parallel.size"
    _validated(Bounds, {SIZE: rules.value_at(recipe, key)}, name=key)
    check_context(recipe)


def _check_loss(recipe: Recipe) -> None:
    types = recipe.get("dpo_loss_type") or ["sigmoid"]
    PreferenceLoss(
        tuple(types),
        tuple(recipe.get("dpo_loss_weights") or [1.0] * len(types)),
        recipe.get("dpo_label_smoothing") or 0.0,
        bool(recipe.get("dpo_use_weighting")),
        1.0 if recipe.get("dpo_ld_alpha") is None else recipe["dpo_ld_alpha"],
        length_penalty=float(recipe.get("edpo_length_penalty") or 0),
    )


def _check_moving(recipe: Recipe) -> None:
    """Checks the options of TR-DPO, whose reference must be a separate model."""
    moving = _validated(Moving, recipe.get("trl") or {}, section="trl.")
    if moving.get("sync_ref_model") and recipe.get("adapter"):
        remedy = "remove it: the reference is the policy without its adapter"
        refuse("trl.sync_ref_model", True, remedy)


def _check_fsdp_version(recipe: Recipe) -> None:
    """Refuses FSDP 1, even if it is only the default of the installed axolotl."""
    options = recipe.get("fsdp_config")
    if not options:
        return
    nested = options.get("fsdp_version") or options.get("version")
    version = recipe.get("fsdp_version") or nested or default_fsdp_version()
    if str(version) != "2":
        remedy = "set `fsdp_version: 2`: FSDP 1 flattens the head that is read"
        refuse("fsdp_version", version, remedy)


def _check_new_adapter(recipe: Recipe) -> None:
    """Refuses a new adapter without a rank or without layers to adapt."""
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


def _check_files(recipe: Recipe) -> None:
    """Refuses paths that do not exist: axolotl would fail later, or not at all."""
    for key, (file, remedy) in rules.FILES.items():
        value = recipe.get(key)
        if isinstance(value, str) and _is_path(key, value):
            path = Path(value) / file
            if not path.exists():
                raise ValueError(f"{quote(key, value)}: there is no {path}; {remedy}")


def _is_path(key: str, value: str) -> bool:
    """Whether a value is surely a path, not a name on the hub and not a template."""
    if key == "chat_template_jinja":
        return "{" not in value
    named = key in ("base_model", "lora_model_dir")
    return not named or value.startswith(("/", ".", "~")) or value.count("/") > 1


# All checks in order: the first that refuses a recipe raises the error.
CHECKS: tuple[Callable[[Recipe], None], ...] = (
    *rules.CONTROL_RULES,
    *rules.UNSUPPORTED_RULES,
    _check_context,
    *rules.DISPATCH_RULES,
    _check_loss,
    *LOSS_RULES,
    check_entries,
    *rules.ADAPTER_RULES,
    _check_moving,
    *rules.CACHE_RULES,
    *rules.IGNORED_RULES,
    *KERNEL_RULES,
    _check_fsdp_version,
    *rules.RANK_RULES,
    _check_new_adapter,
    _check_files,
)
