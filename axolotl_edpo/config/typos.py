"""Finds misspelt keys and options, which axolotl would ignore."""

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import quote
from .args import PREFIX, EDPOArgs


def check_edpo_keys(recipe: Mapping[str, Any]) -> None:
    """Refuses keys that begin with `edpo_` but are not options.

    Raises:
        ValueError: Names the most similar option.
    """
    known = [key for key in EDPOArgs.model_fields if key.startswith(PREFIX)]
    for key in recipe:
        if str(key).startswith(PREFIX) and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"{quote(key, recipe[key])} is not an option of `rl: edpo`: "
                f"did you mean `{near}`?"
            )


def check_command_line(words: Sequence[str], keys: Collection[str]) -> None:
    """Refuses our options on axolotl's command line, which accepts only its own.

    Args:
        words: Words of the command line that axolotl did not parse.
        keys: Names of our options. Every word that begins with `--edpo_` is refused,
            too.

    Raises:
        ValueError: Names the option and where to write it instead.
    """
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        if word.startswith("--") and (key.startswith(PREFIX) or key in keys):
            value = value if equals else " ".join(words[place + 1 : place + 2])
            raise ValueError(
                f"`{option} {value}` on the command line does not reach the recipe: "
                f"write {quote(key, value)} into it; for several values use `--sweep`"
            )


def misspelt(recipe: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Finds unknown keys that are similar to a known key.

    Args:
        recipe: The YAML, not yet validated.
            Keys that begin with `_` or `x-` hold YAML anchors and are skipped.
        known: All keys of axolotl and of the recipe's plugins.

    Returns:
        A warning for each key that may be misspelt, without its value, which may be a
        secret.

    Raises:
        ValueError: If a key is one slip away from a known key that is not in the
            recipe. A slip is a letter that is missing, added or wrong, or two letters
            that are swapped. Also if a key begins with `dpo_` and is similar to no
            known key: it changes the loss in another release of axolotl.
    """
    lines = []
    for key in map(str, recipe):
        if key in known or key.startswith(("_", "x-")):
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if not near and key.startswith("dpo_"):
            raise ValueError(
                f"`{key}` is not an option of this release of axolotl, and the loss "
                "would be another one: remove it, or upgrade axolotl"
            )
        if not near:
            continue
        if _one_slip(key, near[0]) and near[0] not in recipe:
            raise ValueError(
                f"`{key}` is not an option of axolotl: did you mean `{near[0]}`?"
            )
        lines.append(
            f"`{key}` is not an option of axolotl and has no effect: did you mean "
            f"`{near[0]}`?"
        )
    return lines


def _one_slip(a: str, b: str) -> bool:
    """Whether two different words differ by one letter or by one swap of letters."""
    a, b = (word.lower().replace("-", "_") for word in (a, b))
    same = len(os.path.commonprefix([a, b]))
    a, b = a[same:], b[same:]
    swapped = a[:2] == b[1::-1] and a[2:] == b[2:]
    return swapped or a[1:] in (b, b[1:]) or a == b[1:]
