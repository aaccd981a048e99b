"""Refuses adapters of which `axolotl merge-lora` would make another model.

An adapter that is loaded by PEFT is the model that was trained. A merged model may not
be. axolotl has two ways (`merge_method`):

memory_efficient   the default: each tensor in the files of `base_model` is merged. What
                   the adapter has for any other tensor is left out
legacy             PEFT merges the loaded model, which is then saved

The files of some vision-language models name layers otherwise than the loaded model
does. A tied model has one weight for its embedding and its head, and one tensor in its
files. So an adapter with something of its own for one of the two loses it, or changes
both.

check_recipe_adapter   before training: what the recipe would train on a tied model
check_merge            before a merge: what the saved adapter holds

What is refused was measured; tests/runs/test_merged_models.py measures it again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import refuse
from ..upstream import merges_token_rows

METHOD, LEGACY = "merge_method", "legacy"
TYING = "`peft_ensure_weight_tying: true`"


def check_recipe_adapter(cfg: Any) -> None:
    """Refuses a new adapter with something of its own for one side of a tied weight.

    Args:
        cfg: axolotl's config, validated.

    Raises:
        ValueError: Names key, value and what to set.
    """
    if not cfg.adapter or cfg.lora_model_dir or cfg.merge_lora:
        return
    names = embedding_names(cfg)
    if len(names) == 1:
        return
    adapter, legacy = _adapter_of_recipe(cfg), cfg.merge_method == LEGACY
    one_weight = f"{_words(names)} are one weight of this model"
    whole = f"`lora_modules_to_save: [{_short(names[-1])}]` and {TYING}"
    if _adapts(adapter, *names):
        remedy = f"{one_weight}, and LoRA on it cannot be merged: leave it out, or set "
        refuse("lora_target_modules", cfg.lora_target_modules, remedy + whole)
    if _separates(adapter, names) and not legacy:
        remedy = f"{one_weight}, which would be trained as two and merged as one: set "
        remedy += TYING if _knows_tied(adapter) else whole
        refuse("lora_modules_to_save", cfg.lora_modules_to_save, remedy)
    rows = cfg.peft_trainable_token_indices
    if _names_rows_of_head(adapter, names, legacy):
        remedy = f"{one_weight}: name {_words(names[:1])} alone, which trains both"
        refuse("peft_trainable_token_indices", rows, remedy)


def check_merge(recipe: Any) -> None:
    """Refuses to merge a saved adapter into what would be another model.

    Args:
        recipe: The recipe of `axolotl merge-lora`, not yet validated.

    Raises:
        ValueError: Names key, value and what to set.
    """
    folder = Path(recipe.get("lora_model_dir") or recipe.get("output_dir") or ".")
    if not (folder / "adapter_config.json").exists():
        return  # axolotl says so
    adapter, names = PeftConfig.from_pretrained(str(folder)), embedding_names(recipe)
    if what := _never_merged(adapter, names):
        remedy = f"{what} of this adapter cannot be merged: load it with PEFT"
        refuse("lora_model_dir", str(folder), remedy)
    method = recipe.get(METHOD) or "memory_efficient"
    if method == LEGACY:
        return
    what = _left_out(adapter, names, folder) or _new_tokens(recipe, folder)
    if what := what or _renamed_layers(recipe):
        remedy = f"it would leave out {what}: set `{METHOD}: {LEGACY}`"
        refuse(METHOD, method, remedy)


def embedding_names(recipe: Any) -> list[str]:
    """Full names of the modules that hold the weight of the embedding.

    Args:
        recipe: A recipe, or axolotl's config.

    Returns:
        The input embedding and, in a tied model, the head.
    """
    config = load_model_config(recipe)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        tied = config.get_text_config().tie_word_embeddings
        return ["model.embed_tokens", "lm_head"] if tied else ["model.embed_tokens"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weight = model.get_input_embeddings().weight
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, m in modules if getattr(m, "weight", None) is weight]


# --- what an adapter holds of a tied weight ------------------------------------------


def _adapter_of_recipe(cfg: Any) -> LoraConfig:
    """What PEFT is told of the modules that the recipe adapts or saves."""
    return LoraConfig(
        target_modules=cfg.lora_target_modules or [],
        modules_to_save=cfg.lora_modules_to_save or None,
        layers_to_transform=cfg.peft_layers_to_transform,
        layers_pattern=cfg.peft_layers_pattern,
        trainable_token_indices=cfg.peft_trainable_token_indices,
        ensure_weight_tying=bool(cfg.peft_ensure_weight_tying),
    )


def _adapts(adapter: Any, *names: str) -> bool:
    """Whether LoRA is on one of these modules."""
    return any(check_target_module_exists(adapter, name) for name in names)


def _separates(adapter: Any, names: list[str]) -> bool:
    """Whether one of these modules is saved whole, without the others."""
    saved = tuple(adapter.modules_to_save or ())
    is_saved = any(name.endswith(saved) for name in names)
    return len(names) > 1 and is_saved and not _ties(adapter)


def _ties(adapter: Any) -> bool:
    """Whether PEFT keeps the copies of a tied weight equal."""
    return bool(adapter.ensure_weight_tying) and _knows_tied(adapter)


def _knows_tied(adapter: Any) -> bool:
    """Whether a saved module has one of the names for which PEFT looks."""
    return not {*map(_short, adapter.modules_to_save)}.isdisjoint(EMBEDDING_LAYER_NAMES)


def _names_rows_of_head(adapter: Any, names: list[str], legacy: bool) -> bool:
    """Whether rows of a tied head train by their own name.

    PEFT merges them right if the embedding is named beside the head. The other method
    then stops.
    """
    rows = adapter.trainable_token_indices
    named = [isinstance(rows, Mapping) and name.endswith((*rows,)) for name in names]
    return len(names) > 1 and any(named[1:]) and not (named[0] and legacy)


# --- what a merge loses --------------------------------------------------------------


def _never_merged(adapter: Any, names: list[str]) -> str | None:
    """What of an adapter neither method merges, or None."""
    if adapter.layer_replication:
        return "the repeated layers"
    if len(names) > 1 and _adapts(adapter, *names):
        return f"LoRA on {_words(names)}, which are one weight,"
    if _names_rows_of_head(adapter, names, legacy=True):
        return f"rows of {_words(names[1:])} alone, which is tied,"
    return None


def _left_out(adapter: Any, names: list[str], folder: Path) -> str | None:
    """What of an adapter the default method does not merge, or None."""
    if _separates(adapter, names) and not _holds_tied(adapter, names, folder):
        return f"one of {_words(names)}, which were trained as two weights"
    if _adapts(adapter, names[0]):
        return f"LoRA on {_words(names[:1])}"
    rows = adapter.trainable_token_indices
    if rows and not merges_token_rows():
        return "the trained rows of tokens"
    if rows and _names_rows_of_head(adapter, names, legacy=False):
        return f"rows of {_words(names[1:])}"
    return None


def _holds_tied(adapter: Any, names: list[str], folder: Path) -> bool:
    """Whether PEFT tied the saved modules, and named them after the embedding."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        weights = {*file.keys()}
    head = f"base_model.model.{names[-1]}.weight"
    return bool(adapter.ensure_weight_tying) and head in weights


def _new_tokens(recipe: Any, folder: Path) -> str | None:
    """Tokens of the adapter that the tokenizer of `base_model` lacks, or None.

    The default method keeps the tokenizer of `base_model`.
    """
    if not (folder / "tokenizer_config.json").exists():
        return None
    words = [
        AutoTokenizer.from_pretrained(
            path, trust_remote_code=bool(recipe.get("trust_remote_code"))
        ).get_vocab()
        for path in (folder, recipe["base_model"])
    ]
    new = sorted(words[0].keys() - words[1].keys())
    return f"the new tokens {_words(new)} of the tokenizer" if new else None


def _renamed_layers(recipe: Any) -> str | None:
    """Layers that the default method does not find in the files, or None.

    For Gemma 3 and LLaVA it then writes `base_model` as it was, after a warning.
    """
    if not hasattr(load_model_config(recipe), "vision_config"):
        return None
    return "layers that have other names in the files of a vision-language model"


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _words(names: list[str]) -> str:
    return " and ".join(f"`{_short(name)}`" for name in names)
