"""How a recipe wants its pairs in rows, and whether its model can.

    padded         a row per sequence
    padding-free   a row per micro-batch (`dpo_padding_free`)
    packed         the same, and the pairs of an optimizer step are dealt over its
                   micro-batches so that all have about as many tokens
                   (`sample_packing`)

In the last two a prompt can be in its row once, for both answers
(`edpo_prefix_sharing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from axolotl.loaders.utils import load_model_config
from axolotl.utils.logging import get_logger
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .packed_attention import PackingError, check_layers, check_packing, enable_packing

LOG = get_logger(__name__)


@dataclass(frozen=True)
class RowSettings:
    """How a recipe wants its pairs in rows.

    Attributes:
        packs: One row per micro-batch in training (`dpo_padding_free`,
            `sample_packing`).
        deals: Pairs of a step are dealt anew over its micro-batches
            (`sample_packing`).
        eval_packs: One row per batch in evaluation.
        shares: Whether what a pair has in common is in its row once; `auto`: where the
            model can (`edpo_prefix_sharing`).
        may_pad: Whether a model that cannot pack runs padded (`sample_packing: auto`).
    """

    packs: bool = False
    deals: bool = False
    eval_packs: bool = False
    shares: bool | Literal["auto"] = "auto"
    may_pad: bool = False

    @classmethod
    def of(cls, cfg: Any) -> "RowSettings":
        """The settings of a recipe, after it was lowered."""
        packing, evaluation = cfg.edpo_sample_packing, cfg.edpo_eval_sample_packing
        packs = bool(packing or cfg.dpo_padding_free)
        return cls(
            packs=packs,
            deals=bool(packing),
            eval_packs=packs if evaluation is None else evaluation,
            shares=cfg.edpo_prefix_sharing,
            may_pad=packing == "auto",
        )

    @property
    def any(self) -> bool:
        """Whether training or evaluation packs."""
        return self.packs or self.eval_packs

    def story(self) -> str:
        """One line for the log, once it is settled what is done."""
        train = "packed" if self.deals else "padding-free" if self.packs else "padded"
        evaluation = "padding-free" if self.eval_packs else "padded"
        shared = "once" if self.shares else "twice"
        return f"Rows: {train} ({evaluation} in evaluation), common starts {shared}."

    def refusal(self, error: PackingError) -> ValueError:
        """The error of a recipe that asks for what its model cannot do."""
        free = "dpo_padding_free" if self.packs else "eval_sample_packing"
        key = "sample_packing" if self.deals else free
        return ValueError(
            f"`{key}: true` does not work with this `base_model`: {error}. Remove it, "
            "or set `sample_packing: auto`, which pads where packing is not possible"
        )

    def without_packing(self, error: PackingError) -> "RowSettings":
        """Padded rows, with a warning, if the recipe allows them; else its refusal."""
        if not self.may_pad:
            raise self.refusal(error) from None
        LOG.warning(f"`sample_packing: auto`: batches are padded, as {error}.")
        return RowSettings(shares=False)


def check_recipe_model(cfg: Any) -> None:
    """Refuses a model that is known to mix packed sequences, before it is loaded.

    Args:
        cfg: axolotl's config.

    Raises:
        ValueError: Names key, reason and remedy.
    """
    settings = RowSettings.of(cfg)
    if settings.may_pad or not settings.any:
        return
    config = load_model_config(cfg)
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    try:
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            check_layers(kind, config)
    except PackingError as error:
        raise settings.refusal(error) from None


def prepare(wanted: RowSettings, models: Sequence[PreTrainedModel]) -> RowSettings:
    """Makes models able to take packed rows, as far as their layers are known to.

    Args:
        wanted: What the recipe wants.
        models: The policy and, where it is a model of its own, the reference.

    Returns:
        The same, or, after a warning, padded.

    Raises:
        ValueError: Names key, reason and remedy.
    """
    if not wanted.any:
        return replace(wanted, shares=False)
    try:
        for model in models:
            check_layers(type(model), model.config)
            enable_packing(model)
    except PackingError as error:
        return wanted.without_packing(error)
    return wanted


def tried(wanted: RowSettings, model: PreTrainedModel) -> RowSettings:
    """What a model does of what is wanted of it, found by two pairs.

    Args:
        wanted: What `prepare` returned.
        model: The policy, where its engine lets it read its weights.

    Returns:
        The settings, with `shares` true or false; after a warning, padded.

    Raises:
        ValueError: Names key, reason and remedy.
    """
    if not wanted.any:
        return wanted
    try:
        settled = replace(wanted, shares=_shares(wanted, model))
    except PackingError as error:
        return wanted.without_packing(error)
    LOG.info(settled.story())
    return settled


def _shares(wanted: RowSettings, model: PreTrainedModel) -> bool:
    """Whether prefixes are shared."""
    share = bool(wanted.shares)
    try:
        check_packing(model, share)
    except PackingError as error:
        check_packing(model, share=False)
        if wanted.shares != "auto":
            raise ValueError(
                "`edpo_prefix_sharing: true` does not work with this `base_model`: "
                f"{error}. Set `edpo_prefix_sharing: auto`, or false"
            ) from None
        LOG.warning(f"`edpo_prefix_sharing: auto`: prompts are not shared, as {error}.")
        return False
    return share
