"""Differences between the supported releases of axolotl and what is below it.

Each is found by what a release has, not by its number. Releases: axolotl 0.19, 0.20 and
0.21, with torch 2.11 to 2.14, transformers 5.16 to 5.20 and TRL 1.9 to 1.14.
"""

import inspect
from functools import cache
from typing import Any

import click
from axolotl.integrations import base


def automatic_plugins() -> tuple[str, ...]:
    """Plugins that axolotl loads though no recipe names them.

    From 0.21 on, those of the entry-point group `axolotl.plugins`.
    """
    found = getattr(base, "get_builtin_plugins", None)
    return found() if found else ()


def named_plugins(recipe: Any) -> list[str]:
    """The `plugins:` of a recipe; 0.21 takes `module:Class` as well."""
    return [str(name).replace(":", ".") for name in recipe.get("plugins") or ()]


def dropped_words() -> list[str]:
    """Words of the command line that axolotl hands to a launcher, if there is one."""
    context = click.get_current_context(silent=True)
    return [*context.args] if context else []


def default_fsdp_version() -> int:
    """Of a recipe that names none: 1 in axolotl 0.19, then 2."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fields: Any = AxolotlInputConfig.model_fields
    return fields["fsdp_version"].default or 1


def cuts_answers() -> bool:
    """Whether `chat_template` types find an answer in what they wrote by its text.

    Up to axolotl 0.20. In 0.21 it is what follows the rendered prompt.
    """
    from axolotl.prompt_strategies.dpo import chat_template

    return not hasattr(chat_template, "_completion_after_prompt")


def leave_losses_as_they_are(trainer: Any) -> None:
    """Losses are parts of a mean over the optimizer step: no further division.

    transformers reads the first name from 5.19 on, and only the second before.
    """
    trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs = True


def patches_adapters_late() -> bool:
    """Whether LoRA kernels reach an adapter that the trainer makes; from 0.21."""
    from axolotl.core.builders.rl import HFRLTrainerBuilder

    return "hook_post_create_trainer" in vars(HFRLTrainerBuilder)


@cache
def varlen_shares_heads() -> dict[str, Any]:
    """The keyword with which `varlen_attn` takes fewer heads of keys than of queries.

    torch 2.11 has no such keyword and takes them without it.
    """
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if "enable_gqa" in names else {}
