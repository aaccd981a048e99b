"""Checks whether a model can run packed rows, and decides the layout of a run.

check_recipe_model   before the model is loaded: checks its config
prepare_models       before the engine wraps it: checks its layers, enables `segments`
resolve_layout       in the engine: compares a packed row with a padded batch
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from axolotl.utils.logging import get_logger
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..data.completions import select_completions
from ..data.layout import LayoutSettings, each_tensor, model_inputs
from ..data.packing import pack
from ..data.row_parts import part_of_row
from ..distributed import RowGroup
from ..errors import quote, refuse
from ..upstream import carries_state, takes_boundaries
from .forward import evaluating
from .packed_attention import PackingError, enable_packing
from .rope import stretches_beyond
from .split_row import gather_tokens, row_inputs

LOG = get_logger(__name__)

# Layer types that can keep the sequences of a row apart. Others carry a state from one
# sequence to the next, or have a special mask.
LAYERS = {"full_attention", "sliding_attention"}
# A rank that has its rows alone.
ALONE = RowGroup()
# Hidden states that differ by less than this share are taken as equal, in 16 bits.
TOLERANCE = 0.1


def check_recipe_model(cfg: Any) -> None:
    """Checks the config of `base_model`, if the recipe packs and may not pad.

    Args:
        cfg: axolotl's config.

    Raises:
        ValueError: If the model cannot pack; names key, reason and remedy.
    """
    settings = LayoutSettings.from_config(cfg)
    if settings.may_pad or not settings.packs_any:
        return
    config = load_model_config(cfg)
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    try:
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            check_layers(kind, config)
    except PackingError as error:
        raise refusal(settings, error) from None


def check_recipe_rows(cfg: Any) -> None:
    """Checks the config of `base_model`, if ranks divide a row among them.

    Args:
        cfg: axolotl's config.

    Raises:
        ValueError: If they cannot; names the reason and what to set.
    """
    ranks, key = cfg.context_parallel_size or 1, "context_parallel_size"
    if ranks == 1:
        return
    config = load_model_config(cfg).get_text_config()
    if config.num_attention_heads % ranks:
        heads = config.num_attention_heads
        refuse(key, ranks, f"set a divisor of the {heads} heads of `base_model`")
    trained = stretches_beyond(config)
    if trained is not None and cfg.sequence_len > trained:
        refuse(
            key,
            ranks,
            f"set 1, or `sequence_len` up to {trained}: beyond that the positions of "
            "this `base_model` depend on the longest sequence of a row",
        )


def prepare_models(
    wanted: LayoutSettings, models: Sequence[PreTrainedModel]
) -> LayoutSettings:
    """Checks the layers of models, and enables packing, if the recipe packs.

    Args:
        wanted: The layout that the recipe asks for.
        models: The policy and, if it is a separate model, the reference.

    Returns:
        `wanted`. If a model cannot pack and the recipe may pad, it warns and returns
        the settings of padded batches.

    Raises:
        ValueError: If a model cannot pack and the recipe may not pad; names key, reason
            and remedy.
    """
    if not wanted.packs_any:
        return replace(wanted, shares=False)
    try:
        for model in models:
            check_layers(type(model), model.config)
            enable_packing(model)
    except PackingError as error:
        return _padded(wanted, error)
    return wanted


def resolve_layout(
    wanted: LayoutSettings, group: RowGroup, model: PreTrainedModel
) -> LayoutSettings:
    """Decides the layout: runs two pairs in one row, see `check_packing`.

    Args:
        wanted: What `prepare_models` returned.
        group: The ranks that divide rows with this one.
        model: The policy, inside its engine's forward.

    Returns:
        `wanted`, with `shares` true or false. If the model cannot pack and the recipe
        may pad, it warns and returns the settings of padded batches.

    Raises:
        ValueError: If the model cannot do what the recipe asks for; names key, reason
            and remedy.
    """
    if not wanted.packs_any:
        return wanted
    try:
        layout = replace(wanted, shares=_shares(wanted, group, model))
    except PackingError as error:
        if group.size > 1:
            raise ValueError(
                f"{quote('context_parallel_size', group.size)} does not work with this "
                f"`base_model`: {error}. Set 1"
            ) from None
        return _padded(wanted, error)
    LOG.info(layout.description())
    return layout


def _shares(wanted: LayoutSettings, group: RowGroup, model: PreTrainedModel) -> bool:
    """Whether a row holds a shared prefix once.

    Raises:
        PackingError: If the model cannot pack at all.
        ValueError: If the model can pack but not share prefixes, and the recipe has
            `edpo_prefix_sharing: true`.
    """
    share = bool(wanted.shares)
    try:
        check_packing(model, share, group)
    except PackingError as error:
        check_packing(model, False, group)
        if wanted.shares != "auto":
            raise ValueError(
                "`edpo_prefix_sharing: true` does not work with this `base_model`: "
                f"{error}. Set `edpo_prefix_sharing: auto`, or false"
            ) from None
        LOG.warning(f"`edpo_prefix_sharing: auto`: prompts are not shared, as {error}.")
        return False
    return share


def refusal(settings: LayoutSettings, error: PackingError) -> ValueError:
    """The error for a recipe that packs, with a model that cannot.

    Args:
        settings: The layout that the recipe asks for.
        error: Says why the model cannot pack.
    """
    free = "dpo_padding_free" if settings.packs else "eval_sample_packing"
    key = "sample_packing" if settings.balances else free
    return ValueError(
        f"`{key}: true` does not work with this `base_model`: {error}. Remove it, "
        "or set `sample_packing: auto`, which pads where packing is not possible"
    )


def _padded(settings: LayoutSettings, error: PackingError) -> LayoutSettings:
    """The settings of padded batches, after a warning.

    Raises:
        ValueError: If the recipe does not allow padding.
    """
    if not settings.may_pad:
        raise refusal(settings, error) from None
    LOG.warning(f"`sample_packing: auto`: batches are padded, as {error}.")
    return LayoutSettings(shares=False)


def check_layers(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Checks that no layer is known to mix the sequences of a row.

    Args:
        kind: Class of the model.
        config: Config of the model.

    Raises:
        PackingError: If one is; names the reason.
    """
    config = config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or LAYERS) - LAYERS
    if unknown or carries_state(kind):
        names = ", ".join(sorted(unknown)) or config.model_type
        raise PackingError(f"it has layers that carry a state or a mask ({names})")
    if getattr(config, "attention_chunk_size", None) or not takes_boundaries(kind):
        raise PackingError("its attention takes no boundaries between sequences")


def check_packing(model: PreTrainedModel, share: bool, group: RowGroup = ALONE) -> None:
    """Compares two pairs in one packed row with the same pairs in a padded batch.

    Args:
        model: After `enable_packing`, inside its engine's forward.
        share: Whether the row holds the shared prefix of a pair once.
        group: The ranks that divide the row.

    Raises:
        PackingError: If the hidden states differ by more than rounding, if the model
            cannot run the row, or if a sliding window never reaches its attention.
    """
    lengths = torch.tensor([[7], [9], [11], [5]])
    mask = (torch.arange(11) < lengths).long()
    ids = torch.arange(44).view(4, 11) % model.config.get_text_config().vocab_size
    ids[2:, :4] = ids[:2, :4]
    padded = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}
    completions = select_completions(ids, mask)
    row = part_of_row(pack(padded, share, multiple=group.size), *group[:2])
    packed: Any = each_tensor(row, lambda tensor: tensor.to(model.device))
    with evaluating(model):
        expected = _hidden(model, model_inputs(padded), completions.positions)
        own = _hidden(model, row_inputs(packed, group), packed["positions"])
    actual = gather_tokens(own, packed, group)
    differences = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not (difference := differences.max().item()) < TOLERANCE:
        raise PackingError(
            f"sequences in one row change each other: hidden states differ by up to "
            f"{difference:.0%} from those of a padded batch"
        )
    windows = packed["segments"].cache.windows
    if _has_windows(model.config.get_text_config()) and windows <= {None}:
        raise PackingError("its attention is not told of its window")


def _hidden(model: PreTrainedModel, inputs: dict, positions: torch.Tensor) -> Any:
    """Last hidden states at some positions of the flattened batch, in float32.

    Raises:
        PackingError: If the model cannot run these inputs.
    """
    inputs = each_tensor(inputs, lambda tensor: tensor.to(model.device))
    try:
        out = model.base_model(**inputs, use_cache=False)
    except Exception as error:  # the code of a model may raise any exception
        cause = f"{type(error).__name__}: {error}"
        raise PackingError(
            f"its forward does not take several sequences in one row ({cause})"
        ) from None
    return out.last_hidden_state.flatten(0, 1)[positions].float()


def _has_windows(config: PreTrainedConfig) -> bool:
    """Whether the config gives a layer a sliding window."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return "sliding_attention" in layers
    used = getattr(config, "use_sliding_window", True)
    return bool(used and getattr(config, "sliding_window", None))
