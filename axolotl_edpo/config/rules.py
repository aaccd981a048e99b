"""Rules that refuse recipes, as tables: the key, the condition, and what to set.

`validate.py` applies them in order. A rule gets the recipe as it was written, except
that the options of `args.Bounds` have already been parsed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import quote, refuse
from ..losses.beta_controller import Control
from ..losses.edpo import LOWEST_BATCH_BETA
from ..losses.preference import SFT
from ..losses.reference_free import REFERENCE_FREE
from ..upstream_data import takes_images
from .args import CACHE, CONTROL, LOWERED, OF_CONTROL, PRECOMPUTE

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """One reason to refuse a recipe.

    Attributes:
        key: The key that the message names; `trl.beta` is the key `beta` below `trl`.
        applies: Takes the recipe. If its result is truthy, the recipe is refused.
        remedy: What to set instead, or a function that takes the recipe and returns
            this text.
    """

    key: str
    applies: Callable[[Recipe], Any]
    remedy: str | Callable[[Recipe], str]

    def __call__(self, recipe: Recipe) -> None:
        """Refuses the recipe if the rule applies to it.

        Raises:
            ValueError: One line with key, value and remedy.
        """
        if self.applies(recipe):
            text = self.remedy if isinstance(self.remedy, str) else self.remedy(recipe)
            refuse(self.key, value_at(recipe, self.key), text)


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a key such as `peft.loftq_config`; None if it is absent."""
    value: Any = recipe
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def refused(remedies: Mapping[str, str | Callable[[Recipe], str]]) -> tuple[Rule, ...]:
    """Makes rules that refuse any truthy value of a key.

    Args:
        remedies: Key -> what to set instead.
    """
    return tuple(Rule(key, _is_set(key), text) for key, text in remedies.items())


def _is_set(key: str) -> Callable[[Recipe], Any]:
    return lambda recipe: value_at(recipe, key)


def _all_set(*keys: str) -> Callable[[Recipe], bool]:
    return lambda recipe: all(map(recipe.get, keys))


# --- the control of β, and the trace of pairs ----------------------------------------


def _control(recipe: Recipe) -> str:
    return recipe.get(CONTROL) or "epsilon"


def _of_another_control(key: str, owner: Control) -> Rule:
    def applies(recipe: Recipe) -> bool:
        # a lowered recipe holds the defaults of all our options
        written = recipe.get("rl") != "dpo" and recipe.get(key) is not None
        return written and owner != _control(recipe)

    def remedy(recipe: Recipe) -> str:
        named = quote(CONTROL, _control(recipe))
        return f"remove it: it has no effect beside {named}"

    return Rule(key, applies, remedy)


def _beta_is_too_low(recipe: Recipe) -> bool:
    margins, beta = _control(recipe) == "batch_margin", recipe.get("beta")
    return margins and beta is not None and float(beta) < LOWEST_BATCH_BETA


def _filters_sft(recipe: Recipe) -> bool:
    filters = float(recipe.get("edpo_margin_keep") or 1) < 1
    margins = _control(recipe) == "batch_margin"
    return margins and filters and SFT in (recipe.get("dpo_loss_type") or ())


def _without_hub(recipe: Recipe) -> str:
    hub = quote("hub_model_id", recipe["hub_model_id"])
    return (
        f"remove it, or {hub}: everything in `output_dir` is uploaded there, and it "
        "would hold the texts of your pairs"
    )


CONTROL_RULES = (
    *(_of_another_control(key, owner) for key, owner in OF_CONTROL.items()),
    Rule(
        "beta",
        _beta_is_too_low,
        f"set {LOWEST_BATCH_BETA} or more: β-DPO lets β fall no further",
    ),
    Rule(
        "edpo_margin_keep",
        _filters_sft,
        "remove it, or `sft`, which is a mean over tokens, not over pairs",
    ),
    Rule(
        "edpo_log_pairs",
        _all_set("edpo_log_pairs", "hub_model_id"),
        _without_hub,
    ),
)

# --- what this version does not compute ----------------------------------------------

SUPERVISED = "remove it: axolotl gives it to supervised training only"
NOISE = "remove it: its noise would count as part of the log-probabilities"
# Keys that ask for another loss or batch than this version computes, or that would have
# no effect -> what to set instead.
UNSUPPORTED = {
    "reference_free": "remove it: of `dpo_loss_type`, "
    f"{', '.join(REFERENCE_FREE)} have no reference",
    "dpo_norm_loss": "remove it",
    "fsdp": "set `fsdp_version: 2` and `fsdp_config:`",
    "dataset_shard_num": "axolotl ignores it beside `rl`: set `split: train[:10%]` in "
    "`datasets:`",
    "reward_model": "remove it: it asks for another trainer",
    "process_reward_model": "remove it: it asks for another trainer",
    "tiled_mlp": "remove it: axolotl's gradients are wrong with it, under any `rl`",
    "neftune_noise_alpha": NOISE,
    "noisy_embedding_alpha": NOISE,
    "relora": SUPERVISED,
    "lisa_step_interval": SUPERVISED,
    "use_eaft": SUPERVISED,
    "use_dft": SUPERVISED,
    "balance_labels": SUPERVISED,
    "diffusion_lm": "remove it: a diffusion model has no log-probability of an answer",
}
# Keys that split a model or a sequence, allowed up to 1 -> why not more.
SPLITTING = {
    "sequence_parallel_degree": ", and `context_parallel_size` in its place",
    "tensor_parallel_size": "",
    "expert_parallel_size": ": axolotl joins the experts of all ranks in a checkpoint "
    "of supervised training only",
}


def _splits(key: str, reason: str) -> Rule:
    return Rule(
        key, lambda recipe: (recipe.get(key) or 1) > 1, f"set `{key}: 1`{reason}"
    )


def _lacks_images(key: str) -> Rule:
    return Rule(
        key,
        lambda recipe: bool(recipe.get(key)) and not takes_images(),
        "use a text model, or install axolotl 0.21 or later: this release trains "
        "preferences on text only",
    )


UNSUPPORTED_RULES = (
    *refused(UNSUPPORTED),
    *map(_lacks_images, ("is_multimodal", "processor_type")),
    *(_splits(key, reason) for key, reason in SPLITTING.items()),
)
DISPATCH_RULES = refused(
    {
        "accelerator_config.dispatch_batches": "remove it: pairs are handed over "
        "before they are tensors"
    }
)

# --- adapters: the reference is the model with its adapter off -----------------------


ADAPTER_RULES = (
    Rule(
        "fp16",
        lambda recipe: recipe.get("bf16") is True and recipe.get("fp16") is True,
        "remove it, or `bf16: true`: they exclude each other",
    ),
    Rule(
        "peft_init_lora_weights",
        lambda recipe: (
            recipe.get("peft_init_lora_weights") not in (None, True, "gaussian")
        ),
        "remove it: with the adapter off, the model must be `base_model`",
    ),
    Rule(
        "peft.loftq_config",
        _is_set("peft.loftq_config.loftq_bits"),
        "remove it, as it changes `base_model`",
    ),
    Rule(
        "lora_model_dir",
        lambda recipe: recipe.get("lora_model_dir") and not recipe.get("adapter"),
        "set `adapter: lora` or `adapter: qlora`",
    ),
    Rule(
        "rl_adapter_ref_model",
        _all_set("lora_model_dir", "rl_adapter_ref_model"),
        "remove it: the reference of `lora_model_dir` is its own start",
    ),
)

# --- the cache, whose reference must not change --------------------------------------


def _trained_rows(recipe: Recipe) -> list[str]:
    """Entries of `unfrozen_parameters` that name rows, such as `embed_tokens$[5:9]`."""
    return [name for name in recipe.get("unfrozen_parameters") or () if "$[" in name]


def _without_rows(recipe: Recipe) -> str:
    rows = quote("unfrozen_parameters", _trained_rows(recipe)[0])
    return (
        f"remove it, or rows from {rows}: a pair without these tokens would differ "
        "from its cache by rounding only"
    )


def _is_a_file(recipe: Recipe) -> bool:
    path = Path(recipe.get(CACHE) or ".").expanduser()
    return path.exists() and not path.is_dir()


CACHE_RULES = (
    Rule(
        PRECOMPUTE,
        lambda recipe: recipe.get(PRECOMPUTE) not in (None, True, False),
        "set true or false",
    ),
    Rule(
        PRECOMPUTE,
        lambda recipe: (
            recipe.get(PRECOMPUTE) and value_at(recipe, "trl.sync_ref_model")
        ),
        "remove it, or `trl.sync_ref_model`: what is kept of a reference would be "
        "wrong once it moves",
    ),
    Rule(
        PRECOMPUTE,
        lambda recipe: recipe.get(PRECOMPUTE) and _trained_rows(recipe),
        _without_rows,
    ),
    Rule(
        CACHE,
        lambda recipe: recipe.get(CACHE) and not recipe.get(PRECOMPUTE),
        f"set `{PRECOMPUTE}: true` beside it, or remove it",
    ),
    Rule(CACHE, _is_a_file, "name a folder: this is a file"),
)

# --- options that axolotl accepts with `rl` and then ignores -------------------------


def _shares_padded_rows(recipe: Recipe) -> bool:
    packs = any(map(recipe.get, ("dpo_padding_free", *LOWERED.values())))
    return recipe.get("edpo_prefix_sharing") is True and not packs


IGNORED_RULES = (
    Rule(
        "adapter",
        lambda recipe: recipe.get("adapter") == "llama-adapter",
        "set `adapter: lora`: axolotl has no keys for its size",
    ),
    Rule(
        "load_in_4bit",
        lambda recipe: recipe.get("adapter") == "lora" and recipe.get("load_in_4bit"),
        "set `adapter: qlora`: with `lora` nothing is quantized to 4 bits",
    ),
    Rule(
        "unfrozen_parameters",
        _all_set("adapter", "unfrozen_parameters"),
        "remove it: below an adapter nothing trains but `lora_modules_to_save`",
    ),
    Rule(
        "peft_autocast_adapter_dtype",
        lambda recipe: recipe.get("peft_autocast_adapter_dtype") is False,
        "remove it: axolotl does not hand it on beside `rl`",
    ),
    *refused(
        {
            "qat.fake_quant_after_n_steps": "remove it: the reference is quantized "
            "from the start",
        }
    ),
    Rule(
        "edpo_prefix_sharing",
        _shares_padded_rows,
        "set `sample_packing: true` or `dpo_padding_free: true`: padded, each sequence "
        "has a row of its own",
    ),
)

# --- several ranks -------------------------------------------------------------------


def _counts_one_worker(recipe: Recipe) -> bool:
    """Whether axolotl would train too many steps with several Ray workers.

    Its driver counts the steps as for one worker, unless one of these keys is set.
    """
    counts_all = any(map(recipe.get, ("ddp", "fsdp_config", "max_steps")))
    several = (recipe.get("ray_num_workers") or 1) > 1
    return bool(recipe.get("use_ray")) and several and not counts_all


RANK_RULES = (
    Rule(
        "lora_modules_to_save",
        _all_set("fsdp_config", "lora_modules_to_save", "adapter"),
        "remove it or use `deepspeed:`: axolotl cannot save it under FSDP2",
    ),
    Rule(
        "ray_num_workers",
        _counts_one_worker,
        lambda recipe: (
            f"set `ddp: true`, or axolotl trains {recipe['ray_num_workers']} times "
            "`num_epochs`"
        ),
    ),
)

# --- tables for other checks and warnings --------------------------------------------

# Keys that axolotl ignores with `rl`, and that would change neither weights nor pairs
# -> what to use instead.
WITHOUT_EFFECT = {
    "group_by_length": "`sample_packing: true` needs no padding at all",
    "auto_find_batch_size": "set `micro_batch_size` to what fits",
    "layer_offloading": "`deepspeed:` or `fsdp_config:` offload",
    "do_bench_eval": "it is for supervised training",
    "do_causal_lm_eval": "it is for supervised training",
    "generate_samples": "it is for supervised training",
    "bench_dataset": "it is for supervised training",
    "center_rewards_coefficient": "it is for reward models",
    "dataset_keep_in_memory": "prepared data are read from disk as they are needed",
    "eot_tokens": "an answer is scored as the chat template ends it",
    "eval_sequence_len": "`sequence_len` holds in evaluation, too",
    "pad_to_sequence_len": "rows are as long as their pairs",
    "pretrain_multipack_attn": "it is for pretraining",
    "pretraining_sample_concatenation": "it is for pretraining",
    "streaming_multipack_buffer_size": "it is for pretraining",
    "role_boundaries": "answers alone are scored",
    "train_on_inputs": "answers alone are scored",
    "fa_varlen_kwargs_in_collator": "`sample_packing: true` packs pairs",
}
# Keys that need a GPU -> what to set without one.
NEEDS_GPU = {
    "fp16": "set `bf16: true` (`auto` becomes fp16)",
    "float16": "set `bf16: true`",
    "activation_offloading": "remove it",
    "profiler_steps": "remove it",
    "lora_mlp_kernel": "remove it",
    "lora_qkv_kernel": "remove it",
    "lora_o_kernel": "remove it",
}
# Keys that name a file or a folder -> a file that the folder must hold, and a remedy.
FILES = {
    "base_model": ("config.json", "name a folder with a model, or one on the hub"),
    "lora_model_dir": ("adapter_config.json", "name the folder of a saved adapter"),
    "deepspeed": ("", "`axolotl fetch deepspeed_configs` gets those of axolotl"),
    "chat_template_jinja": ("", "a template would have `{`, this is taken for a file"),
}
# Keys whose value must be a mapping.
SECTIONS = (
    "trl",
    "peft",
    "qat",
    "accelerator_config",
    "fsdp_config",
    "context_parallel",
)
# All keys that set the initial β.
BETA_KEYS = ("beta", "rl_beta", "dpo_beta", "trl.beta")
