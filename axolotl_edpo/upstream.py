"""Private and moving names of axolotl and its libraries, one function each.

Where releases differ, a function looks for what the release has, not for its number.
Supported: axolotl 0.19, 0.20 and 0.21, with torch 2.11 to 2.14, transformers 5.16 to
5.20 and TRL 1.9 to 1.14. `tests/test_upstream.py` pins every function.
"""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
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


def leave_losses_as_they_are(trainer: Any) -> None:
    """Keeps the trainer from dividing each loss by the number of micro-batches.

    Losses are already shares of a mean over the optimizer step. transformers reads
    `loss_is_scaled_for_ga` from 5.19 on, and `model_accepts_loss_kwargs` before.
    """
    trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs = True


def load_reference_if(is_wanted: Callable[[Any], bool]) -> None:
    """Lets axolotl load a reference model only where it is wanted.

    axolotl 0.19 to 0.21 load one for any `rl: dpo` without an adapter. They find
    `setup_reference_model` in this Python module, after they have loaded the policy.

    Args:
        is_wanted: Whether the run of a config has a reference.
    """
    from axolotl import train

    load: Any = train.setup_reference_model
    load = getattr(load, "of_axolotl", load)

    def call(cfg: Any, *args: Any) -> Any:
        return load(cfg, *args) if is_wanted(cfg) else None

    call.of_axolotl = load  # type: ignore[attr-defined]
    train.setup_reference_model = call


@contextmanager
def reference_of_trl(wanted: bool) -> Iterator[None]:
    """Within it, TRL's DPO trainer loads a reference only if it is wanted.

    TRL 1.9 to 1.14 load one by `create_model_from_path` in this Python module, if they
    are given none and the policy has no adapter.
    """
    from trl.trainer import dpo_trainer

    names: Any = dpo_trainer
    load = names.create_model_from_path
    if not wanted:
        names.create_model_from_path = lambda *args, **kwargs: None
    try:
        yield
    finally:
        names.create_model_from_path = load


def patches_adapters_late() -> bool:
    """Whether axolotl applies LoRA kernels after it made the trainer; from 0.21 on."""
    from axolotl.core.builders.rl import HFRLTrainerBuilder

    return "hook_post_create_trainer" in vars(HFRLTrainerBuilder)


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


@contextmanager
def without_engine() -> Iterator[None]:
    """Within it, axolotl loads a config and neither starts nor needs DeepSpeed.

    `load_cfg` of axolotl 0.19 to 0.21 prepares the engine by `prepare_optim_env` in
    this Python module, and refuses to do so twice in a process.
    """
    from axolotl.cli import config

    names: Any = config
    prepare, names.prepare_optim_env = names.prepare_optim_env, lambda cfg: None
    try:
        yield
    finally:
        names.prepare_optim_env = prepare


def has_context_parallelism() -> bool:
    """Whether accelerate's device mesh has the axis of `context_parallel_size`.

    axolotl sets it from 0.20 on. Before, it divides batches in groups of its own.
    """
    return find_spec("axolotl.integrations.context_parallel") is not None


def restore_engine(accelerator: Any) -> None:
    """Makes the engine's name a `DistributedType` again.

    axolotl 0.20 and 0.21 set it to a string under context parallelism with DDP.
    accelerate's collectives read its `value`.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType(state.distributed_type)


def leave_rows_as_they_are(trainer: Any) -> None:
    """Keeps accelerate and transformers from dividing rows, as our batches are parts.

    accelerate 1.15 would also replace the masks of attention, in `_prepare_cp`.
    axolotl 0.20 and 0.21 replace the same two methods for their context parallelism.
    """
    trainer.accelerator._prepare_cp = lambda *prepared: prepared
    trainer._prepare_context_parallel_inputs = lambda _, inputs: (nullcontext, inputs)


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


def prepare_for_evaluation(trainer: Any) -> None:
    """Prepares what FSDP2 wants beside the model, for an evaluation without training.

    axolotl has this function from 0.21 on. With other engines it does nothing.

    Raises:
        ValueError: Under FSDP, if axolotl has no such function.
    """
    import axolotl.evaluate

    prepare = getattr(axolotl.evaluate, "prepare_fsdp2_model_for_eval", None)
    if prepare:
        prepare(trainer)
    elif trainer.is_fsdp_enabled:
        raise ValueError(
            "`fsdp_config`: this axolotl evaluates under FSDP in training only: score "
            "in one process, or install axolotl 0.21"
        )


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
