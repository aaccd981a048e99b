"""`axolotl edpo-schema`: the JSON schema of a recipe, for completion in editors.

It is axolotl's schema with `rl: edpo` and the options of `EDPOArgs` added. An editor
with a YAML language server uses it where a recipe begins with

    # yaml-language-server: $schema=edpo.schema.json
"""

import json
from pathlib import Path
from typing import Any

import click
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError

from .args import LOWERED, PREFIX, EDPOArgs


class _ByName(GenerateJsonSchema):
    """Writes an enum of torch dtypes as the names of its members.

    JSON has no dtypes. That is why `axolotl config-schema` prints only a simplified
    schema. Here the default of such a field is left out. Any string is allowed, because
    axolotl accepts further names.
    """

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}

    def enum_schema(self, schema: Any) -> dict[str, Any]:
        try:
            return super().enum_schema(schema)
        except PydanticSerializationError:
            names = [member.name for member in schema["members"]]
            return {"anyOf": [{"enum": names}, {"type": "string"}]}


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes with any `rl`, including `edpo`.

    Returns:
        A schema with the options of axolotl and of `EDPOArgs`. It forbids keys that
        begin with `edpo_` but are not options.
    """
    from axolotl.utils.schemas.config import AxolotlInputConfig

    schema = AxolotlInputConfig.model_json_schema(schema_generator=_ByName)
    options = EDPOArgs.model_json_schema()["properties"]
    properties = schema["properties"]
    properties.update(options)
    schema["$defs"]["RLType"]["enum"].append("edpo")
    for key, lowered in LOWERED.items():
        kinds = properties[key]["anyOf"]
        kinds += [kind for kind in options[lowered]["anyOf"] if kind not in kinds]
    prefixed = [key for key in options if key.startswith(PREFIX)]
    names = "|".join(key.removeprefix(PREFIX) for key in prefixed)
    schema["patternProperties"] = {f"^{PREFIX}(?!({names})$)": False}
    return schema


@click.command("edpo-schema")
@click.argument("file", type=click.Path(dir_okay=False), required=False)
def edpo_schema(file: str | None) -> None:
    """Print the JSON schema of recipes with `rl: edpo`, or write it to FILE.

    `axolotl` prints its banner first, so its redirected output is no JSON.
    """
    text = json.dumps(recipe_schema(), indent=2)
    if file is None:
        click.echo(text)
        return
    Path(file).write_text(text + "\n")
    line = f"# yaml-language-server: $schema={file}"
    click.echo(f"Wrote {file}. For completion, begin a recipe with the line: {line}")
