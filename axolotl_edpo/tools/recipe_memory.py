"""What a recipe says about its memory: `Arguments`, and what they miss.

No weights are loaded, only the config of `base_model`. A micro-batch is calculated with
the most tokens that it can have: each of its pairs has two sequences, each as long as
`sequence_len` allows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from peft import PeftConfig

from ..config.args import PRECOMPUTE
from ..config.context_rules import SIZE, check_ranks
from ..config.rules import value_at
from ..errors import quote
from ..losses.reference_free import reference_free
from ..models.packing_support import check_recipe_rows
from ..reference.precompute import CacheSettings
from .memory import LIVE, Arguments, Engine
from .model_sizes import Sizes, sizes_of

# GPUs that are assumed for a recipe with an engine that shards, and no sizes.
SHARDING_GPUS = 8
SHARDS, REPLICAS = "dp_shard_size", "dp_replicate_size"
# Sizes of accelerate's mesh of GPUs, which has as many as their product.
MESH = (SIZE, SHARDS, REPLICAS)
SYNC = "accelerator_config.gradient_accumulation_kwargs.sync_each_batch"
ZERO = "deepspeed.zero_optimization"
OFFLOADED = "is not counted: less is needed on the GPU"


@dataclass(frozen=True)
class RecipeMemory:
    """The memory of a recipe.

    Attributes:
        arguments: What is calculated.
        assumed: Whether neither the user nor the recipe says how many GPUs there are.
        model: `base_model`.
        pairs: Pairs of a micro-batch (`micro_batch_size`).
        accumulation: Micro-batches of an optimizer step.
        length: Most tokens of a sequence (`sequence_len`).
        given: Whether the tokens of a micro-batch were given.
        moves: Whether the reference moves (`trl.sync_ref_model`).
        notes: What the calculation leaves out or assumes, a sentence each.
    """

    arguments: Arguments
    assumed: bool
    model: str
    pairs: int
    accumulation: int
    length: int
    given: bool
    moves: bool
    notes: tuple[str, ...]


class Note(NamedTuple):
    """What is said of a recipe if its value of a key is not counted as it is.

    Attributes:
        key: The key; `fsdp_config.offload_params` is one below `fsdp_config`.
        applies: Takes the value of the key; None if it is absent.
        text: What follows the key and its value.
    """

    key: str
    applies: Callable[[Any], Any]
    text: str


def _is_a_device(value: Any) -> bool:
    return value not in (None, "none")


NOTES = (
    Note(
        "gradient_checkpointing",
        lambda value: not value,
        "needs far more: the activations of all layers stay. They are counted as with "
        "`gradient_checkpointing: true`",
    ),
    Note(
        "attn_implementation",
        lambda value: value == "eager",
        "needs more: it keeps whole matrices of attention scores, which are not "
        "counted",
    ),
    Note(
        "optimizer",
        lambda value: value not in (None, "adamw_torch", "adamw_torch_fused"),
        "is counted as AdamW, with two moments per weight that trains",
    ),
    Note("load_in_8bit", bool, "is not counted: weights are taken to have 16 bits"),
    Note(
        "lora_target_modules",
        bool,
        "is counted as an adapter on all linear layers",
    ),
    Note("lora_target_parameters", bool, "is not counted"),
    Note("lora_modules_to_save", bool, "is not counted: these modules train whole"),
    Note("unfrozen_parameters", bool, "is not counted: all weights are taken to train"),
    Note(
        "fsdp_config.reshard_after_forward",
        lambda value: value is False,
        "needs more: layers stay whole after forward, which is not counted",
    ),
    Note("fsdp_config.offload_params", bool, OFFLOADED),
    Note(f"{ZERO}.offload_optimizer.device", _is_a_device, OFFLOADED),
    Note(f"{ZERO}.offload_param.device", _is_a_device, OFFLOADED),
    Note("activation_offloading", bool, OFFLOADED),
)


def recipe_memory(cfg: Any, gpus: int | None, tokens: int | None) -> RecipeMemory:
    """Reads what is to be calculated from a recipe.

    Args:
        cfg: axolotl's config, validated.
        gpus: Number of GPUs; None: as many as the sizes of MESH make. Without sizes
            SHARDING_GPUS for an engine that shards, else one.
        tokens: Tokens of a micro-batch; None: the most that it can have.

    Raises:
        ValueError: If the engine or the model cannot be calculated, or if training
            refuses these GPUs.
    """
    engine, sizes = _engine(cfg), _sizes(cfg)
    pairs, length = cfg.micro_batch_size, cfg.sequence_len
    mesh = {key: cfg[key] for key in MESH if (cfg[key] or 1) > 1}
    usual = 1 if engine == "ddp" else SHARDING_GPUS
    ranks = gpus or (prod(mesh.values()) if mesh else usual)
    check_ranks(DictDefault({**cfg, "world_size": ranks}))
    _check_mesh(mesh, engine, ranks)
    check_recipe_rows(cfg)
    dtype = cfg.torch_dtype or torch.bfloat16  # with Ray, its worker chooses
    arguments = Arguments(
        sizes=sizes,
        engine=engine,
        ranks=ranks,
        tokens=tokens or pairs * 2 * length,
        lora=_rank(cfg),
        four_bit=bool(cfg.load_in_4bit),
        cached=bool(cfg.precompute_ref_log_probs),
        two_numbers=_keeps_two_numbers(cfg),
        reference_free=reference_free(cfg.dpo_loss_type) is not None,
        itemsize=dtype.itemsize,
        float32_root=_has_float32_root(cfg, engine),
        sync=cfg.gradient_accumulation_steps == 1 or bool(value_at(cfg, SYNC)),
        live=_live(cfg),
        context=mesh.get(SIZE, 1),
        replicas=mesh.get(REPLICAS, 1),
    )
    return RecipeMemory(
        arguments,
        assumed=not (gpus or mesh),
        model=cfg.base_model,
        pairs=pairs,
        accumulation=cfg.gradient_accumulation_steps,
        length=length,
        given=tokens is not None,
        moves=bool(value_at(cfg, "trl.sync_ref_model")),
        notes=tuple(_notes(cfg)),
    )


def _engine(cfg: Any) -> Engine:
    """The engine of a recipe; FSDP 1 was refused before."""
    if cfg.fsdp_config:
        return "fsdp2"
    if not cfg.deepspeed:
        return "ddp"
    stage = value_at(cfg, f"{ZERO}.stage") or 0
    engines: dict[int, Engine] = {1: "zero1", 2: "zero2", 3: "zero3"}
    if stage not in engines:
        raise ValueError(
            f"{quote('zero_optimization', {'stage': stage})} of `deepspeed:` cannot be "
            "calculated: set stage 1, 2 or 3"
        )
    return engines[stage]


def _check_mesh(mesh: dict[str, int], engine: Engine, ranks: int) -> None:
    """Refuses what accelerate refuses when training starts.

    Args:
        mesh: The sizes above 1, by their keys in MESH.
        engine: The engine of the recipe.
        ranks: Number of GPUs.
    """
    if engine == "fsdp2" and REPLICAS in mesh and SHARDS not in mesh:
        raise ValueError(
            f"{quote(REPLICAS, mesh[REPLICAS])} under FSDP2 needs `{SHARDS}`: set it "
            f"to the GPUs that share the weights of a replica, or remove `{REPLICAS}`"
        )
    product = prod(mesh.values())
    if mesh and product != ranks:
        keys = " with ".join(quote(key, size) for key, size in mesh.items())
        raise ValueError(
            f"{keys} takes {product} GPUs, not {ranks}: remove `--gpus`, or set sizes "
            f"whose product is {ranks}"
        )


def _sizes(cfg: Any) -> Sizes:
    config = load_model_config(cfg)
    try:
        return sizes_of(config)
    except (AttributeError, StopIteration, ValueError):
        named = quote("base_model", cfg.base_model)
        raise ValueError(
            f"{named} of type {config.model_type} cannot be calculated: it needs "
            "decoder layers, each with attention and an MLP, and no images"
        ) from None


def _rank(cfg: Any) -> int:
    """Rank of the adapter, which a saved one has in its own config; 0 without one."""
    if not cfg.adapter:
        return 0
    saved = cfg.lora_model_dir
    return PeftConfig.from_pretrained(saved).r if saved else cfg.lora_r


def _keeps_two_numbers(cfg: Any) -> bool:
    """Whether a cache of the reference keeps two numbers per pair, if there is one."""
    cache = CacheSettings.from_config(DictDefault({**cfg, PRECOMPUTE: True}))
    return cache is not None and not cache.needs_logits


def _has_float32_root(cfg: Any, engine: Engine) -> bool:
    """Whether axolotl keeps embedding and head in float32.

    Other engines and adapters cast them to the dtype of the model.
    """
    return engine == "ddp" and not (cfg.adapter or cfg.attn_needs_dtype_cast)


def _live(cfg: Any) -> int:
    """`stage3_max_live_parameters`, if it is a number; DeepSpeed has one for `auto`."""
    given = value_at(cfg, f"{ZERO}.stage3_max_live_parameters")
    return int(given) if isinstance(given, int | float) else LIVE


def _notes(cfg: Any) -> list[str]:
    found = ((note, value_at(cfg, note.key)) for note in NOTES)
    return [
        f"{quote(note.key, value)} {note.text}."
        for note, value in found
        if note.applies(value)
    ]
