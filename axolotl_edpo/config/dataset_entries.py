"""Checks the entries of `datasets:` and `test_datasets:`.

With `rl`, axolotl reads only a few options of an entry. It ignores the others silently,
and would train on other pairs than the recipe says.
"""

import os
from collections.abc import Mapping
from typing import Any

from ..data.columns import has_chat_template
from ..errors import as_yaml, quote, refuse

# Options of an entry that would change its pairs but that axolotl ignores with `rl` ->
# what to do instead. Those before `shards` belong to chat templates.
IGNORED = {
    "chat_template": "set it for the whole recipe",
    "chat_template_jinja": "set it for the whole recipe",
    "message_property_mappings": "name them `role` and `content` in the data",
    "message_field_role": "name it `role` in the data",
    "message_field_content": "name it `content` in the data",
    "roles": "name them `system`, `user`, `assistant` and `tool` in the data",
    "shards": "set `split: train[:10%]`",
    "preprocess_shards": "remove it",
    "weight": "set `split: train[:50%]`",
}
# Options of chat templates that axolotl does read -> their defaults.
FIELDS = {
    "field_messages": "messages",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}


def check_entries(recipe: Mapping[str, Any]) -> None:
    """Refuses entries that axolotl would not read as they are written.

    Args:
        recipe: The YAML, not yet validated.

    Raises:
        ValueError: Names the option and what to do instead.
    """
    _check_form(recipe)
    _check_options(recipe)
    _check_test_datasets(recipe)


def _check_form(recipe: Mapping[str, Any]) -> None:
    """Refuses entries without a path, and empty files: axolotl would fail later."""
    for key in ("datasets", "test_datasets"):
        entries: Any = _entries(recipe, key)
        if isinstance(entries, str | Mapping):
            line = f"{quote(key, entries)}: a list of entries `- path:` is due"
            raise ValueError(line)
        for entry in entries:
            path = entry.get("path") if isinstance(entry, Mapping) else None
            if not path:
                line = f"`{key}`: `{as_yaml(entry)}` has no `path:`; every entry does"
                raise ValueError(line)
            if os.path.isfile(path) and not os.path.getsize(path):
                raise ValueError(f"`{key}`: {quote('path', path)} is an empty file")


def _check_options(recipe: Mapping[str, Any]) -> None:
    for name in ("datasets", "test_datasets"):
        for entry in _entries(recipe, name):
            for key, remedy in IGNORED.items():
                if entry.get(key) and not _is_default(key, entry, recipe):
                    refuse(f"{name}: {key}", entry[key], f"it is ignored, {remedy}")


def _entries(recipe: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return recipe.get(name) or []


def _is_default(key: str, entry: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether the option has the value that axolotl uses anyway."""
    value = entry[key]
    if key in ("shards", "preprocess_shards", "weight"):
        return value == 1
    if not has_chat_template(entry):
        return True
    if key in ("roles", "message_property_mappings"):
        return isinstance(value, Mapping) and _maps_to_itself(key, value)
    default = "tokenizer_default" if key == "chat_template" else key.split("_")[-1]
    return value == (recipe.get(key) or default)


def _maps_to_itself(key: str, names: Mapping[str, Any]) -> bool:
    if key == "roles":
        return all(role in aliases for role, aliases in names.items())
    return all(names.get(name, name) == name for name in ("role", "content"))


def _check_test_datasets(recipe: Mapping[str, Any]) -> None:
    """Refuses options that differ from those of the entry of `datasets:` of same index.

    axolotl reads the options of entry i of `test_datasets:` from entry i of
    `datasets:`.
    """
    trained = _entries(recipe, "datasets")
    for place, entry in enumerate(_entries(recipe, "test_datasets")):
        source: Mapping[str, Any] = trained[place] if place < len(trained) else {}
        options = FIELDS if has_chat_template(entry) else {}
        if isinstance(entry.get("type"), Mapping):
            options = {"type": ""}
        for key, default in options.items():
            if (entry.get(key) or default) != (source.get(key) or default):
                remedy = "it is taken from the entry of `datasets:` at its place"
                refuse(f"test_datasets: {key}", entry.get(key), remedy)
