"""What differs between the releases of axolotl that this package works with.

Found by what a release has, not by its number. Once 0.19 and 0.20 are left behind, all
of this is what the last lines say.
"""

from collections.abc import Collection
from typing import Any

from axolotl.integrations import base


def always_on() -> Collection[str]:
    """Plugins that axolotl loads without `plugins:`; from 0.21, of installed packages."""
    return getattr(base, "get_builtin_plugins", tuple)()


def default_fsdp_version() -> int:
    """Of a recipe that names none: 1 in 0.19, then 2."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fields: Any = AxolotlInputConfig.model_fields
    return fields["fsdp_version"].default or 1


def cuts_answers() -> bool:
    """Whether `chat_template` types look for an answer in what they wrote; till 0.20."""
    from axolotl.prompt_strategies.dpo import chat_template

    return not hasattr(chat_template, "_completion_after_prompt")
