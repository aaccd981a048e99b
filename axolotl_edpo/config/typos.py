"""Keys and options that nobody reads: axolotl ignores them, a user meant something."""

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .args import PREFIX, EDPOArgs


def check_own_keys(recipe: Mapping[str, Any]) -> None:
    """Refuses keys that begin like ours and are none.

    Raises:
        ValueError: Names the nearest of ours.
    """
    known = [key for key in EDPOArgs.model_fields if key.startswith(PREFIX)]
    for key in recipe:
        if str(key).startswith(PREFIX) and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"`{key}: {recipe[key]}` is not an option of `rl: edpo`: "
                f"did you mean `{near}`?"
            )


def check_command_line(words: Sequence[str], keys: Collection[str]) -> None:
    """Refuses our options on axolotl's command line, which takes axolotl's only.

    Args:
        words: What axolotl did not take.
        keys: Of our options, beside those that begin with `edpo_`.

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
                f"write `{key}: {value}` into it; for several values use `--sweep`"
            )


def misspelt(recipe: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Finds keys that axolotl would ignore and that are nearly a key it knows.

    Args:
        recipe: The YAML, not yet validated.
        known: All keys of axolotl and of the recipe's plugins. Keys that begin with
            `_` or `x-` are nobody's: they hold YAML anchors.

    Returns:
        A line for each key that could be another one, misspelt; without its value,
        which may be a secret.

    Raises:
        ValueError: If a key is certainly another one: a single letter is missing, too
            many or wrong, or two are swapped, and that other one is not there itself.
            Or if it is an option of the loss in another release of axolotl.
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
    """Whether two different words differ by one letter, or by two that are swapped."""
    a, b = (word.lower().replace("-", "_") for word in (a, b))
    same = len(os.path.commonprefix([a, b]))
    a, b = a[same:], b[same:]
    swapped = a[:2] == b[1::-1] and a[2:] == b[2:]
    return swapped or a[1:] in (b, b[1:]) or a == b[1:]
