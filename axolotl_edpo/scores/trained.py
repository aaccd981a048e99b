"""`TrainedModel`: what a folder of a run holds, and whether it fits a recipe.

Everything is read from small files, before a model is loaded.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from peft.utils import WEIGHTS_NAME as ADAPTER_PICKLE
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..errors import quote
from ..run_files import CONTROLLER, STATE, is_complete, last_complete

WEIGHTS = (
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
)
# Keys of a model's config that a trained model shares with the model it was before.
SHAPES = ("model_type", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class TrainedModel:
    """A model that a run has trained.

    Attributes:
        folder: An `output_dir` or a checkpoint.
        state_folder: The folder of the last state of the run: `folder`, or its newest
            complete checkpoint; None if it has none.
        state: The content of `trainer_state.json` there; empty if it has none.
    """

    folder: Path
    state_folder: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "TrainedModel":
        """Reads the last state of a run.

        Raises:
            ValueError: If there is no such folder.
        """
        if not folder.is_dir():
            raise ValueError(
                f"`--model {folder}`: there is no such folder: name the `output_dir` "
                "of a run, or one of its checkpoints"
            )
        for found in (folder, last_complete(folder)):
            if found and is_complete(found):
                text = (found / STATE).read_text(encoding="utf-8")
                return cls(folder, found, json.loads(text))
        return cls(folder)

    @property
    def step(self) -> int:
        """Number of optimizer steps of the run; 0 if it is not known."""
        return self.state.get("global_step", 0)

    @property
    def controller(self) -> dict[str, Any] | None:
        """β and the settings of its control; None if no `rl: edpo` has saved them."""
        return (self.state.get("stateful_callbacks") or {}).get(CONTROLLER)

    def require_fit(self, cfg: Any) -> None:
        """Refuses a folder whose weights are not those that the recipe trains.

        Args:
            cfg: axolotl's config, validated.

        Raises:
            ValueError: Names the folder and the remedy.
        """
        best = cfg.load_best_model_at_end or cfg.early_stopping_patience
        if best and self.state_folder != self.folder:
            raise self._refusal(
                "may hold the weights of the best step, and not those of the last, "
                "whose β would be used: name one of its checkpoints"
            )
        if cfg.adapter:
            self._require_adapter(cfg)
        else:
            self._require_weights(cfg)

    def _has(self, *names: str) -> bool:
        return any((self.folder / name).exists() for name in names)

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"`--model {self.folder}` {reason}")

    def _require_adapter(self, cfg: Any) -> None:
        key = quote("adapter", cfg.adapter)
        if not self._has(ADAPTER_WEIGHTS, ADAPTER_PICKLE):
            whole = self._has(*WEIGHTS)
            raise self._refusal(
                f"holds whole weights, and the recipe has {key}: name the folder of "
                "the adapter, or remove the key to score merged weights"
                if whole
                else f"holds no adapter, and the recipe has {key}: name the "
                "`output_dir` of a run that has ended, or a checkpoint"
            )
        config = json.loads((self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if base and os.path.realpath(base) != os.path.realpath(cfg.base_model):
            raise self._refusal(
                f"holds an adapter of {base}, and the recipe has "
                f"{quote('base_model', cfg.base_model)}: they must be the same model"
            )

    def _require_weights(self, cfg: Any) -> None:
        if not self._has(*WEIGHTS):
            adapter = self._has(ADAPTER_WEIGHTS, ADAPTER_PICKLE)
            raise self._refusal(
                "holds an adapter, and the recipe has no `adapter`: add it"
                if adapter
                else "holds no weights: name the `output_dir` of a run that has ended, "
                "or a checkpoint; `axolotl merge-sharded-fsdp-weights` makes them of "
                "the shards of FSDP"
            )
        trained = _text_config(self.config_of(cfg))
        base = _text_config(cfg)
        for key in SHAPES:
            found, expected = getattr(trained, key, None), getattr(base, key, None)
            if found != expected:
                raise self._refusal(
                    f"was not trained from {quote('base_model', cfg.base_model)}: "
                    f"its config has {quote(key, found)} instead of {expected}"
                )
        rows = _rows(cfg, base.vocab_size)
        if trained.vocab_size != rows:
            raise self._refusal(
                f"has a vocabulary of {trained.vocab_size} tokens, and the recipe one "
                f"of {rows}: use the recipe of the run, with its `tokens` and "
                "`special_tokens`"
            )

    def config_of(self, cfg: Any) -> DictDefault:
        """The config of the recipe that loads these weights instead of `base_model`.

        The tokenizer stays that of the recipe.
        """
        folder, base = str(self.folder), cfg.base_model_config or cfg.base_model
        others = {
            "tokenizer_config": cfg.tokenizer_config or base,
            "processor_config": cfg.processor_config or base,
            "revision_of_model": None,
        }
        own = {"base_model": folder, "base_model_config": folder}
        return DictDefault({**cfg, **others, **own})


def _text_config(cfg: Any) -> Any:
    """The config of the language model of a recipe."""
    return load_model_config(cfg).get_text_config()


def _rows(cfg: Any, before: int) -> int:
    """Number of embeddings after axolotl has made room for the recipe's tokenizer.

    Args:
        cfg: axolotl's config.
        before: Their number in `base_model`.
    """
    needed = len(load_tokenizer(cfg))
    if cfg.resize_token_embeddings_to_32x:
        needed = -(-needed // 32) * 32
    return needed if cfg.shrink_embeddings else max(before, needed)
