"""`EDPOSettings`: the settings of a recipe, grouped by the part that uses them."""

from dataclasses import dataclass, field
from typing import Any

from ..data.evaluation_sets import set_names
from ..data.layout import LayoutSettings
from ..losses.beta_controller import ControllerSettings
from ..losses.reference_free import Terms
from ..models.start import ModelSettings
from ..reference.precompute import CacheSettings


@dataclass(frozen=True)
class EDPOSettings:
    """Settings of a recipe that are not arguments of TRL's trainer.

    Attributes:
        controller: β₀, ε and the rule that changes β.
        layout: How pairs are laid out in rows.
        models: Where policy and reference come from.
        cache: Cache of the reference; None: the reference runs for every batch.
        log_pairs: Pairs are traced every so many optimizer steps; None: never.
        length_penalty: By how much a token lowers the reward of its answer; 0: not.
        max_kl: The run stops beyond this KL per token, nats; None: no bound.
        sets: Names of the sets of `test_datasets:`; empty if there are fewer than two.
        terms: Settings of a loss without a reference.
    """

    controller: ControllerSettings
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings | None = None
    length_penalty: float = 0.0
    log_pairs: int | None = None
    max_kl: float | None = None
    sets: tuple[str, ...] = ()
    terms: Terms = field(default_factory=Terms)

    @classmethod
    def from_config(cls, cfg: Any, beta: float) -> "EDPOSettings":
        """Reads the settings of a recipe.

        Args:
            cfg: axolotl's config, validated.
            beta: β₀.
        """
        return cls(
            ControllerSettings.from_config(cfg, beta),
            LayoutSettings.from_config(cfg),
            ModelSettings.from_config(cfg),
            CacheSettings.from_config(cfg),
            cfg.edpo_length_penalty,
            cfg.edpo_log_pairs,
            cfg.edpo_max_kl,
            set_names(cfg),
            Terms.from_config(cfg),
        )
