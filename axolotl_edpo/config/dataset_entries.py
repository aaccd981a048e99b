"""The entries of `datasets:` and `test_datasets:`, of which axolotl ignores much.

Beside `rl`, axolotl reads few of their options; the others it drops silently, and
would train on other pairs than the recipe says.
"""

import os
from collections.abc import Mapping
from typing import Any

from ..errors import refuse

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
    """What axolotl meets with an error of Python's, or of a library's."""
    for key in ("datasets", "test_datasets"):
        entries: Any = _entries(recipe, key)
        if isinstance(entries, str | Mapping):
            raise ValueError(f"`{key}: {entries}`: a list of entries `- path:` is due")
        for entry in entries:
            path = entry.get("path") if isinstance(entry, Mapping) else None
            if not path:
                raise ValueError(f"`{key}`: `{entry}` has no `path:`; every entry does")
            if os.path.isfile(path) and not os.path.getsize(path):
                raise ValueError(f"`{key}`: `path: {path}` is an empty file")


def _check_options(recipe: Mapping[str, Any]) -> None:
    for name in ("datasets", "test_datasets"):
        for entry in _entries(recipe, name):
            for key, remedy in IGNORED.items():
                if entry.get(key) and not _is_default(key, entry, recipe):
                    refuse(f"{name}: {key}", entry[key], f"it is ignored, {remedy}")


def _entries(recipe: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return recipe.get(name) or []


def _is_default(key: str, entry: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether axolotl does the same without this option."""
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
        return all(role in others for role, others in names.items())
    return all(names.get(name, name) == name for name in ("role", "content"))


def has_chat_template(entry: Mapping[str, Any]) -> bool:
    """Whether axolotl writes this entry's messages with a chat template."""
    return str(entry.get("type")).startswith("chat_template")


def _check_test_datasets(recipe: Mapping[str, Any]) -> None:
    """axolotl reads an entry's options from the entry of `datasets:` at its place."""
    trained = _entries(recipe, "datasets")
    for place, entry in enumerate(_entries(recipe, "test_datasets")):
        read: Mapping[str, Any] = trained[place] if place < len(trained) else {}
        options = FIELDS if has_chat_template(entry) else {}
        if isinstance(entry.get("type"), Mapping):
            options = {"type": ""}
        for key, default in options.items():
            if (entry.get(key) or default) != (read.get(key) or default):
                remedy = "it is taken from the entry of `datasets:` at its place"
                refuse(f"test_datasets: {key}", entry.get(key), remedy)
