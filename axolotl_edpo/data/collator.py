"""`PairCollator`: TRL's collator, with packed rows in addition.

TRL truncates, pads and computes the masks. A packed row is built from lists of tokens;
TRL's collator runs only for pairs that must be truncated. Everything runs on the CPU,
so the lengths are known without waiting for the GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .completions import Completions, select_completions
from .layout import Batch, Examples
from .packing import Pair, TokenSequence, balance_by_tokens, pack_pairs, pairs_of
from .row_parts import part_of_row

# Entries of a batch of text in TRL.
TRL_ENTRIES = ("input_ids", "attention_mask", "completion_mask")


def keep_examples(pairs: list[dict[str, Any]]) -> dict[str, Examples]:
    """Collator of the data loader: passes the pairs on; they are laid out later."""
    return {"examples": Examples(pairs)}


def pairs_in(batch: Mapping[str, Any]) -> int:
    """Number of pairs that a laid-out batch scores."""
    return len(batch["lengths"]) // 2


@dataclass
class PairCollator(DataCollatorForPreference):
    """Lays out pairs as batches for the model.

    Attributes:
        packs: Whether a batch is one row without padding, instead of a row per
            sequence.
        shares: With `packs`: whether the prefix that chosen and rejected share is in
            the row once.
        parts: With `packs`: number of ranks that divide a row among them.
        part: Index of this rank's part.
    """

    packs: bool = False
    shares: bool = False
    parts: int = 1
    part: int = 0

    def torch_call(self, examples: list[dict[str, Any]]) -> Batch:  # type: ignore[override]
        """Lays out one micro-batch.

        Args:
            examples: `prompt_ids`, `chosen_ids` and `rejected_ids` of each pair.
                Without pairs the batch is short and scores nothing: an engine needs
                every rank to run a forward.

        Returns:
            The entries of `Batch`; `position_ids` and `segments` only if it is packed.
        """
        return self._own_part(self._whole(examples))

    def balance(self, step: list[list[dict[str, Any]]]) -> list[Batch]:
        """Spreads the pairs of an optimizer step over its micro-batches, by tokens.

        Args:
            step: The pairs of each micro-batch.

        Returns:
            A batch per micro-batch. All have about the same number of tokens.
        """
        examples = [example for micro_batch in step for example in micro_batch]
        pairs = self._pairs(examples)
        balanced = balance_by_tokens([pair.tokens for pair in pairs], len(step))
        return [
            self._lay_out([examples[i] for i in items], [pairs[i] for i in items])
            for items in balanced
        ]

    def _lay_out(self, examples: list[dict[str, Any]], pairs: list[Pair]) -> Batch:
        if examples and self.packs:
            return self._own_part(self._packed(examples, pairs))
        return self.torch_call(examples)

    def _whole(self, examples: list[dict[str, Any]]) -> Batch:
        """A batch whose row is not divided."""
        if not examples:
            return self._empty_batch()
        if self.packs:
            return self._packed(examples, self._pairs(examples))
        return self._padded(examples)

    def _own_part(self, batch: Batch) -> Batch:
        return batch if self.parts == 1 else part_of_row(batch, self.parts, self.part)

    def _empty_batch(self) -> Batch:
        """A batch of one pair of padding tokens, of which none is scored."""
        token = [self.pad_token_id]
        padding = {"prompt_ids": token, "chosen_ids": token, "rejected_ids": token}
        batch: Any = self._whole([padding])
        for name in Completions._fields:
            batch[name] = batch[name][:0]
        return {**batch, "chosen_tokens": 0, "num_tokens": 0, "examples": Examples([])}

    def _pairs(self, examples: list[dict[str, Any]]) -> list[Pair]:
        """The pairs of some examples. TRL's collator truncates the long ones."""
        long = [example for example in examples if self._is_long(example)]
        truncated = iter(
            pairs_of(super().torch_call(long), self.shares) if long else []
        )
        return [
            next(truncated) if self._is_long(example) else self._pair(example)
            for example in examples
        ]

    def _is_long(self, example: dict[str, Any]) -> bool:
        """Whether TRL truncates a sequence of this pair."""
        if self.max_length is None:
            return False
        completion = max(len(example["chosen_ids"]), len(example["rejected_ids"]))
        return len(example["prompt_ids"]) + completion > self.max_length

    def _pair(self, example: dict[str, Any]) -> Pair:
        prompt = example["prompt_ids"]
        chosen, rejected = (
            TokenSequence(prompt + example[completion], len(prompt))
            for completion in ("chosen_ids", "rejected_ids")
        )
        return Pair.from_sequences(chosen, rejected, self.shares)

    def _packed(self, examples: list[dict[str, Any]], pairs: list[Pair]) -> Batch:
        sequences = [sequence for pair in pairs for sequence in pair[:2]]
        multiple = (self.pad_to_multiple_of or 1) * self.parts
        return {
            **pack_pairs(pairs, self.pad_token_id, multiple),
            "chosen_tokens": sum(pair.chosen.scored for pair in pairs),
            "num_tokens": sum(len(sequence.ids) for sequence in sequences),
            "examples": Examples(examples),
        }

    def _padded(self, examples: list[dict[str, Any]]) -> Batch:
        return padded_batch(super().torch_call(examples), examples)


def padded_batch(padded: Mapping[str, Any], examples: list[dict[str, Any]]) -> Batch:
    """A padded batch, from what TRL's collator returns.

    Args:
        padded: `input_ids`, `attention_mask` and `completion_mask`, each of shape
            (sequences, length); further entries are inputs of the model's forward.
        examples: The pairs that are scored. TRL's batch may have more pairs after them.

    Returns:
        The entries of a padded `Batch`.
    """
    ids, mask = padded["input_ids"], padded["attention_mask"]
    pairs, scored = len(examples), padded["completion_mask"].clone()
    counted = mask.clone()
    for answers in (*scored.chunk(2), *counted.chunk(2)):
        answers[pairs:] = 0
    positions, targets, lengths = select_completions(ids, scored)
    lengths = torch.cat([answers[:pairs] for answers in lengths.chunk(2)])
    more = {name: padded[name] for name in padded if name not in TRL_ENTRIES}
    batch: Batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "copies": counted,
        "positions": positions,
        "targets": targets,
        "lengths": lengths,
        "chosen_tokens": int(lengths.chunk(2)[0].sum()),
        "num_tokens": int(counted.sum()),
        "examples": Examples(examples),
    }
    return {**batch, "images": more} if more else batch


def trl_collator(args: Any, collator: Any) -> Any:
    """Replaces axolotl's collator, whose batches have an old format, by TRL's.

    Args:
        args: TRL's arguments. `pad_to_multiple_of` is copied into them.
        collator: The collator that axolotl passes to the trainer.

    Returns:
        None, for which TRL makes its collator; or `collator`, if it is not axolotl's.
    """
    if not isinstance(collator, AxolotlDPODataCollatorWithPadding):
        return collator
    args.pad_to_multiple_of = collator.pad_to_multiple_of
    return None
