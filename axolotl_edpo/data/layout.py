"""The layout of batches: the settings of a recipe, and the entries of a batch.

    padded         a row per sequence
    padding-free   a row per micro-batch (`dpo_padding_free`)
    packed         a row per micro-batch, and the pairs of an optimizer step are spread
                   over its micro-batches so that all have about as many tokens
                   (`sample_packing`)

In padding-free and packed batches, the prefix that chosen and rejected share can be in
the row once instead of twice (`edpo_prefix_sharing`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch

from .segments import Segments

# Names of the entries of a batch that are arguments of the model's forward.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "segments")


@dataclass(frozen=True)
class LayoutSettings:
    """The layout that a recipe asks for.

    Attributes:
        packs: Whether a micro-batch of training is one row (`dpo_padding_free`,
            `sample_packing`).
        balances: Whether the pairs of a step are spread over its micro-batches by
            tokens (`sample_packing`).
        eval_packs: Whether a batch of evaluation is one row (`eval_sample_packing`).
        shares: Whether the shared prefix of a pair is in a row once; `auto`: if the
            model supports it (`edpo_prefix_sharing`).
        may_pad: Whether batches are padded if the model cannot pack
            (`sample_packing: auto`).
    """

    packs: bool = False
    balances: bool = False
    eval_packs: bool = False
    shares: bool | Literal["auto"] = "auto"
    may_pad: bool = False

    @classmethod
    def from_config(cls, cfg: Any) -> "LayoutSettings":
        """The settings of a recipe.

        Args:
            cfg: axolotl's config, after the plugin has resolved its keys.
        """
        packing, evaluation = cfg.edpo_sample_packing, cfg.edpo_eval_sample_packing
        packs = bool(packing or cfg.dpo_padding_free)
        return cls(
            packs=packs,
            balances=bool(packing),
            eval_packs=packs if evaluation is None else evaluation,
            shares=cfg.edpo_prefix_sharing,
            may_pad=packing == "auto",
        )

    @property
    def packs_any(self) -> bool:
        """Whether batches of training or of evaluation are one row."""
        return self.packs or self.eval_packs

    def description(self) -> str:
        """One line for the log, once `shares` is true or false."""
        packed = "packed" if self.balances else "padding-free"
        train = packed if self.packs else "padded"
        evaluation = "padding-free" if self.eval_packs else "padded"
        shared = "once" if self.shares else "twice"
        return (
            f"Batches: {train} ({evaluation} in evaluation), "
            f"shared prefixes {shared} in a row."
        )


@dataclass(eq=False)
class Examples:
    """The pairs of a micro-batch, as the data loader yields them.

    It is not a list, because accelerate would process each item of a list. Two
    instances are never equal, so an instance can be a key of a dictionary.

    Attributes:
        pairs: `prompt_ids`, `chosen_ids` and `rejected_ids` of each pair, and the other
            columns of the data set.
    """

    pairs: list[dict[str, Any]]


class Batch(TypedDict, total=False):
    """A batch that is laid out for the model.

    A padded batch has a row per sequence, all chosen, then all rejected. A packed batch
    has one row.

    Attributes:
        input_ids: Shape (rows, length), int64.
        attention_mask: Padded: shape (rows, length), 1 on tokens and 0 on padding.
            Packed: `no_mask()`.
        position_ids: Packed only. Shape (1, length), int64.
        segments: Packed only. Which keys each query of the row sees.
        images: Pairs with images only. Further inputs of the model: pixels, and which
            tokens stand for them, in the shapes of its processor.
        copies: Shape (rows, length), how many sequences a token belongs to: 0 for
            padding, 2 for a shared prefix.
        positions: Shape (tokens,), int64, see `Completions`.
        targets: Shape (tokens,), int64, see `Completions`.
        lengths: Shape (sequences,), int64, see `Completions`.
        chosen_tokens: Number of scored tokens of chosen completions.
        num_tokens: Number of tokens of all sequences. It is the same in every layout:
            a shared prefix counts twice, and padding not at all.
        examples: The pairs of the batch, as the data loader yielded them.

    Under context parallelism, `input_ids`, `position_ids`, `copies`, `positions` and
    `targets` are those of this rank's part of the row (`row_parts.py`), and there are

        part_sizes: Number of scored tokens of each part.
        places: Shape (tokens,), int64: of the tokens of all parts, part after part, the
            index among the scored tokens of the whole row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    images: dict[str, torch.Tensor]
    copies: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    chosen_tokens: int
    num_tokens: int
    examples: Examples
    part_sizes: tuple[int, ...]
    places: torch.Tensor


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that are arguments of the model's forward."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    return inputs | batch.get("images", {})


def each_tensor(
    batch: Mapping[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """A copy of a batch with `change` applied to every tensor."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return each_tensor(value, change)
        return change(value) if isinstance(value, torch.Tensor) else value

    return {name: changed(value) for name, value in batch.items()}


def release_masks(batch: Mapping[str, Any]) -> None:
    """Frees the masks and boundaries that the forward of a batch has computed."""
    if "segments" in batch:
        batch["segments"].clear_cache()
