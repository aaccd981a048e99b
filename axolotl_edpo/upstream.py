"""Private and moving names of axolotl and its libraries, one function each.

Where releases differ, a function looks for what the release has, not for its number.
Supported: axolotl 0.19, 0.20 and 0.21, with torch 2.11 to 2.14, transformers 5.16 to
5.20 and TRL 1.9 to 1.14. `tests/test_upstream.py` pins every function.
"""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from axolotl.integrations import base


def automatic_plugins() -> tuple[str, ...]:
    """Plugins that axolotl loads without being named in the recipe.

    From 0.21 on: those of the entry-point group `axolotl.plugins`. Before: none.
    """
    found = getattr(base, "get_builtin_plugins", None)
    return found() if found else ()


def named_plugins(recipe: Any) -> list[str]:
    """`plugins:` of a recipe, as `module.Class`; 0.21 also accepts `module:Class`."""
    return [str(name).replace(":", ".") for name in recipe.get("plugins") or ()]


def dropped_words() -> list[str]:
    """Words of the command line that axolotl did not parse, meant for a launcher."""
    context = click.get_current_context(silent=True)
    return [*context.args] if context else []


def recipe_keys() -> set[str]:
    """All keys that a recipe may have: those of axolotl and of the loaded plugins.

    axolotl 0.19 to 0.21 merge the fields of these classes into one, which takes longer.
    """
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlInputConfig

    names = PluginManager.get_instance().get_input_args()
    classes = [AxolotlInputConfig, *map(pkgutil.resolve_name, names)]
    fields = {key: field for c in classes for key, field in c.model_fields.items()}
    return {*fields, *(field.alias for field in fields.values() if field.alias)}


def entry_keys() -> set[str]:
    """Keys of an entry of `datasets:` that axolotl reads with `rl: dpo`.

    axolotl 0.19 to 0.21 remove all others, without a word.
    """
    from axolotl.utils.schemas.datasets import DPODataset

    return {*DPODataset.model_fields}


def text_type_keys() -> set[str]:
    """Keys of a `type` that names columns and formats; axolotl removes all others."""
    from axolotl.utils.schemas.datasets import UserDefinedDPOType

    return {*UserDefinedDPOType.model_fields}


def pair_types() -> set[str]:
    """First words of axolotl's types of preference data, such as `chatml`."""
    from axolotl.prompt_strategies import dpo

    return {module.name for module in pkgutil.iter_modules(dpo.__path__)}


def file_type(path: str) -> str:
    """The format of a data file, which axolotl infers from its name with `rl`."""
    from axolotl.utils.data.shared import get_dataset_type
    from axolotl.utils.dict import DictDefault

    return get_dataset_type(DictDefault(path=path))


def keep_adapter_in_float32(model: Any) -> None:
    """Casts the trainable weights of an adapter to float32, in place.

    In axolotl from 0.20 on, for the key `lora_fp32_gradients`.
    """
    from axolotl.utils.lora_precision import upcast_lora_parameters

    upcast_lora_parameters(model)


def loss_watchdog(cfg: Any) -> Any:
    """The callback of `loss_watchdog_threshold`; axolotl 0.19 to 0.21."""
    from axolotl.utils.callbacks import LossWatchDogCallback

    return LossWatchDogCallback(cfg)


def default_fsdp_version() -> int:
    """The FSDP version of a recipe without `fsdp_version`.

    1 in axolotl 0.19, 2 from 0.20 on.
    """
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fields: Any = AxolotlInputConfig.model_fields
    return fields["fsdp_version"].default or 1


def prepare_pairs_with(prepare: Callable[..., Any], is_ours: Callable) -> None:
    """Lets a function prepare the pairs of our recipes, for every command of axolotl.

    A plugin's hook `load_datasets` is not called by `axolotl evaluate`. All commands of
    axolotl 0.19 to 0.21 find `prepare_preference_datasets` in this Python module.

    Args:
        prepare: Takes axolotl's function, a config and a tokenizer.
        is_ours: Whether a config is one of `rl: edpo`.
    """
    from axolotl.common import datasets

    load = pairs_loader()

    def call(cfg: Any, tokenizer: Any) -> Any:
        return prepare(load, cfg, tokenizer) if is_ours(cfg) else load(cfg, tokenizer)

    call.of_axolotl = load  # type: ignore[attr-defined]
    datasets.prepare_preference_datasets = call


def pairs_loader() -> Callable[[Any, Any], Any]:
    """axolotl's function that prepares pairs, without what `prepare_pairs_with` adds.

    It takes a config and a tokenizer, and returns two data sets.
    """
    from axolotl.common import datasets

    load: Any = datasets.prepare_preference_datasets
    return getattr(load, "of_axolotl", load)


def tokenize_pairs(
    trainer_class: Any,
    dataset: Any,
    tokenizer: Any,
    name: str,
    max_length: int,
    num_proc: int | None,
) -> Any:
    """Tokenizes pairs as a trainer does when it is made, without its model.

    Of itself, the trainer of TRL 1.9 to 1.14 uses nothing but the tokenizer for this.

    Args:
        trainer_class: TRL's `DPOTrainer`, or a class that is derived from it.
        dataset: What axolotl prepared.
        tokenizer: The recipe's tokenizer.
        name: `train` or `eval`, for messages.
        max_length: Most tokens of a sequence.
        num_proc: Number of processes; None: this one.
    """
    from trl import DPOConfig

    trainer = object.__new__(trainer_class)
    trainer._tokenizer = tokenizer
    arguments = SimpleNamespace(
        max_length=max_length,
        truncation_mode=DPOConfig.truncation_mode,
        dataset_num_proc=num_proc,
    )
    return trainer._prepare_dataset(dataset, tokenizer, arguments, name)


@contextmanager
def preparing_with(preparation: Any) -> Iterator[None]:
    """Puts methods of a `Preparation` in the place of functions of axolotl.

    Private names of `axolotl.utils.data.rl` in 0.19 to 0.21, called there by name.
    """
    from axolotl.utils.data import rl

    is_kept = preparation.is_kept()
    new = {
        "load_dpo": partial(preparation.load_type, rl.load_dpo),
        "_load_split": partial(preparation.load_split, rl._load_split),
        "generate_dataset_hash_from_config": preparation.folder_name,
        "_drop_long_sequences": is_kept,
        "_truncate_long_sequences_rl": preparation.truncate,
    }
    before = {name: getattr(rl, name) for name in new}
    vars(rl).update(new)
    try:
        yield
    finally:
        vars(rl).update(before)


def prepared_root(cfg: Any) -> Path:
    """The folder in which axolotl keeps prepared data."""
    from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH

    return Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)


def prepared_path(cfg: Any, name: str) -> Path:
    """Where prepared data are, of which the folder has this name."""
    from axolotl.utils.data.shared import get_prepared_dataset_path

    return get_prepared_dataset_path(cfg, name)


def leave_losses_as_they_are(trainer: Any) -> None:
    """Keeps the trainer from dividing each loss by the number of micro-batches.

    Losses are already shares of a mean over the optimizer step. transformers reads
    `loss_is_scaled_for_ga` from 5.19 on, and `model_accepts_loss_kwargs` before.
    """
    trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs = True


def patches_adapters_late() -> bool:
    """Whether axolotl applies LoRA kernels after it made the trainer; from 0.21 on."""
    from axolotl.core.builders.rl import HFRLTrainerBuilder

    return "hook_post_create_trainer" in vars(HFRLTrainerBuilder)


def takes_images() -> bool:
    """Whether axolotl's preference training takes images; from 0.21 on."""
    from axolotl.core.builders.rl import HFRLTrainerBuilder

    return hasattr(HFRLTrainerBuilder, "_build_vision_collator")


def image_collator(cfg: Any, tokenizer: Any) -> Any:
    """The collator of pairs with images that axolotl's builder makes, without a model.

    Private methods of the builder in 0.21. They read three of its attributes.

    Args:
        cfg: axolotl's config of a vision-language model.
        tokenizer: The recipe's tokenizer.
    """
    from axolotl.core.builders.rl import HFRLTrainerBuilder
    from axolotl.loaders import load_processor

    builder = SimpleNamespace(cfg=cfg, tokenizer=tokenizer)
    builder.processor = load_processor(cfg, tokenizer)
    HFRLTrainerBuilder._prepare_vision_processor(builder)
    return HFRLTrainerBuilder._build_vision_collator(builder)


def merges_token_rows() -> bool:
    """Whether `merge_method: memory_efficient` merges trained rows of tokens.

    From axolotl 0.21 on. Before, it leaves them out.
    """
    from axolotl.cli.utils import lora_merge

    return hasattr(lora_merge, "adapter_has_trainable_token_deltas")


@cache
def varlen_shares_heads() -> dict[str, Any]:
    """Keywords that let `varlen_attn` have fewer key heads than query heads.

    Empty in torch 2.11, which needs none.
    """
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if "enable_gqa" in names else {}


# --- transformers: attention and layers ----------------------------------------------


def attention_name(config: Any) -> str:
    """The name of a model's attention in the registry `AttentionInterface`.

    transformers 5.16 to 5.20 keep it in `_attn_implementation` of the config.
    """
    return config._attn_implementation


def eager_attention(module: Any, query, key, value, attention_mask, **keywords) -> Any:
    """Calls the eager attention of a layer.

    transformers 5.16 to 5.20 do not register it. It is the function
    `eager_attention_forward` in the Python module that defines the layer's class.
    """
    attend = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return attend(module, query, key, value, attention_mask, **keywords)


def carries_state(kind: Any) -> bool:
    """Whether models of this class carry a recurrent state from token to token.

    `_is_stateful` in transformers 5.16 to 5.20.
    """
    return kind._is_stateful


def takes_boundaries(kind: Any) -> bool:
    """Whether models of this class accept boundaries between packed sequences.

    Those for FlashAttention do: `_supports_flash_attn` in transformers 5.16 to 5.20.
    """
    return kind._supports_flash_attn


# --- transformers: mixtures of experts -----------------------------------------------


def recorded_outputs(model: Any) -> Collection[str]:
    """Names of what a model's forward can return in addition to hidden states.

    `_can_record_outputs` in transformers 5.16 to 5.20, which may be absent or None.
    """
    return getattr(model, "_can_record_outputs", None) or ()


def load_balancing_loss(model: Any) -> Callable[..., Any] | None:
    """The function that computes the router loss of a mixture of experts, or None.

    In transformers 5.16 to 5.20 it is `load_balancing_loss_func` in the Python module
    that defines the model's class. FSDP2 gives the model a subclass, so base classes
    are searched, too.
    """
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    found = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    return next(filter(None, found), None)


# --- engines -------------------------------------------------------------------------


@cache
def forward_redirection() -> Callable[..., Any]:
    """A callable that runs a function inside the forward of a wrapped module.

    It takes wrapped module, module, function and arguments; private in TRL 1.9 to 1.14.
    """
    from trl.models.utils import _ForwardRedirection

    return _ForwardRedirection()


def shard_fsdp2(accelerator: Any, model: Any) -> Any:
    """Shards a model as FSDP2 shards the policy.

    Calls what `accelerator.prepare` calls, under the name that axolotl 0.19 to 0.21
    patch. It then also sends the weights of rank 0 to ranks that loaded none.
    """
    import accelerate.accelerator

    return accelerate.accelerator.fsdp2_prepare_model(accelerator, model)


def is_remote_code(model_class: type) -> bool:
    """Whether a model class comes from code that is shipped with the weights.

    transformers 5.16 to 5.20 import such code below `transformers_modules`.
    """
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return model_class.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)


def is_repeated_blocks(module: Any) -> bool:
    """Whether a module is a list of layers that all have the same class.

    Such layers are compiled one by one. accelerate does not export this function.
    """
    from accelerate.utils.other import is_repeated_blocks

    return is_repeated_blocks(module)


def recipe_config() -> Any:
    """axolotl's validated config of the recipe that runs."""
    return base.PluginManager.get_instance().cfg


def take_compile_options(accelerator: Any) -> dict[str, Any]:
    """Takes the options of `torch_compile` away from accelerate.

    Otherwise accelerate would compile the model as a whole when it prepares it.

    Returns:
        Keywords of `torch.compile`; empty without `torch_compile`.
    """
    from accelerate.utils import DynamoBackend

    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return {}
    options = plugin.to_kwargs()
    plugin.backend = DynamoBackend.NO
    return options


def forget_model(accelerator: Any, model: Any) -> None:
    """Removes a model from accelerate's private list of prepared models."""
    models = accelerator._models
    models[:] = [prepared for prepared in models if prepared is not model]


def size_in_words(size: int) -> str:
    """Writes a number of bytes with a unit, such as "64.00 KiB".

    datasets 4.8 to 5.0 have it in `datasets.utils.py_utils` and do not export it.
    """
    from datasets.utils.py_utils import size_str

    return size_str(size)


def wait_for_every_gather() -> None:
    """Lets ZeRO-3 gather the weights of a list one by one, on CPU ranks.

    DeepSpeed 0.18.9 waits for the last one only, and gloo may finish that one first.
    0.19.8 waits for all of them (deepspeedai/DeepSpeed#8539).
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import Init

    if get_accelerator().device_name() == "cpu":
        each = Init._allgather_params_sequential
        Init._allgather_params_coalesced = lambda init, *args, **_: each(init, args[0])


def deepspeed_optimizer_files(checkpoint: Path) -> list[Path]:
    """Files of the optimizer state that ZeRO divided among ranks, one per rank.

    DeepSpeed 0.18 and 0.19 name them like
    `global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt`.
    """
    return [*checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")]
