"""Checks the entries of `datasets:` and `test_datasets:`.

With `rl`, axolotl reads only a few options of an entry. It ignores the others silently,
and would train on other pairs than the recipe says.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..data.columns import has_chat_template
from ..errors import as_yaml, quote, refuse
from ..upstream_data import entry_keys, file_type, pair_types, text_type_keys

# Options of an entry that axolotl ignores with `rl` -> what to do instead. For others
# that it ignores, it is to remove them.
TEMPLATE_OPTIONS = {
    "chat_template": "set it for the whole recipe",
    "chat_template_jinja": "set it for the whole recipe",
    "message_property_mappings": "name them `role` and `content` in the data",
    "message_field_role": "name it `role` in the data",
    "message_field_content": "name it `content` in the data",
    "roles": "name them `system`, `user`, `assistant` and `tool` in the data",
}
IGNORED = {
    **TEMPLATE_OPTIONS,
    "drop_system_message": "remove system messages from the data",
    "field_tools": "name the column `tools` in the data",
    "field_thinking": "name it as the chat template does in the data",
    "shards": "set `split: train[:10%]`",
    "preprocess_shards": "remove it",
    "weight": "set `split: train[:50%]`",
    "name": "save that part of the data in a file",
    "ds_type": "give the file the extension of its format",
}
# Without effect on pairs.
HARMLESS = {"trust_remote_code"}
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
            for key, remedy in _ignored(entry, recipe):
                refuse(f"{name}: {key}", entry[key], f"it is ignored, {remedy}")
            if isinstance(entry.get("type"), Mapping):
                _check_text_type(name, entry["type"])
                _check_evaluated_type(name, entry["type"])


def _ignored(
    entry: Mapping[str, Any], recipe: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yields the options of an entry that axolotl ignores, and what to do instead."""
    read = entry_keys() | HARMLESS
    for key in entry:
        if key not in read and entry[key] and not _is_default(key, entry, recipe):
            yield key, IGNORED.get(key, "remove it")
    if _is_text_type(entry):
        for key, default in FIELDS.items():
            if entry.get(key) not in (None, default):
                yield key, "only `chat_template` types read it: name the column so"


def _is_text_type(entry: Mapping[str, Any]) -> bool:
    """Whether the type is one of axolotl without a chat template."""
    kind = entry.get("type")
    if not kind or isinstance(kind, Mapping):
        return True
    module = str(kind).partition(".")[0]
    return module in pair_types() and not has_chat_template(entry)


def _check_text_type(name: str, options: Mapping[str, Any]) -> None:
    """Refuses unknown keys of a `type` with `field_*` and `*_format`."""
    for key in options:
        if key not in text_type_keys():
            known = ", ".join(sorted(text_type_keys()))
            refuse(f"{name}: type: {key}", options[key], f"its keys are {known}")


def _check_evaluated_type(name: str, options: Mapping[str, Any]) -> None:
    """Refuses such a `type` in `test_datasets`, where axolotl removes its keys."""
    if name == "test_datasets" and any(options.values()):
        remedy = (
            "axolotl removes its keys there, and would evaluate rows as they are: save "
            "the texts as columns `prompt`, `chosen` and `rejected`, without `type`"
        )
        refuse(f"{name}: type", options, remedy)


def _entries(recipe: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return recipe.get(name) or []


def _is_default(key: str, entry: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether the option has the value that axolotl uses anyway."""
    value = entry[key]
    if key in ("shards", "preprocess_shards", "weight"):
        return value == 1
    if key == "ds_type":
        return value == file_type(str(entry["path"]))
    if key not in TEMPLATE_OPTIONS:
        return False
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
