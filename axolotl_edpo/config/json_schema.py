"""`axolotl edpo-schema`: the JSON schema of a recipe, for completion in editors.

axolotl's own schema with `rl: edpo` in it and the options of `EDPOArgs`. An editor with
a YAML language server reads it where a recipe begins with

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
    """One of axolotl's enums holds torch dtypes, which a recipe gives by name.

    That is why `axolotl config-schema` prints less than a schema. Its default is left
    out; and the names are suggestions, as axolotl takes others for some.
    """

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}

    def enum_schema(self, schema: Any) -> dict[str, Any]:
        try:
            return super().enum_schema(schema)
        except PydanticSerializationError:
            names = [member.name for member in schema["members"]]
            return {"anyOf": [{"enum": names}, {"type": "string"}]}


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe of any `rl`, `edpo` included.

    Returns:
        What axolotl allows, and in addition what `EDPOPlugin` does. Keys that begin
        with `edpo_` and are no options are not allowed.
    """
    from axolotl.utils.schemas.config import AxolotlInputConfig

    schema = AxolotlInputConfig.model_json_schema(schema_generator=_ByName)
    own = EDPOArgs.model_json_schema()["properties"]
    properties = schema["properties"]
    properties.update(own)
    schema["$defs"]["RLType"]["enum"].append("edpo")
    for key, lowered in LOWERED.items():
        kinds = properties[key]["anyOf"]
        kinds += [kind for kind in own[lowered]["anyOf"] if kind not in kinds]
    names = "|".join(key.removeprefix(PREFIX) for key in own if key.startswith(PREFIX))
    schema["patternProperties"] = {f"^{PREFIX}(?!({names})$)": False}
    return schema


@click.command("edpo-schema")
@click.argument("file", type=click.Path(dir_okay=False), required=False)
def edpo_schema(file: str | None) -> None:
    """Print the JSON schema of recipes with `rl: edpo`, or write it to FILE.

    `axolotl` prints its banner first: redirected, that would be no JSON.
    """
    text = json.dumps(recipe_schema(), indent=2)
    if file is None:
        click.echo(text)
        return
    Path(file).write_text(text + "\n")
    click.echo(f"Wrote {file}: name it in a recipe's first line, see the README.")
