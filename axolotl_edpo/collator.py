"""TRL's collator, and the rows made of what it returns.

Truncation, padding and masks are TRL's. A batch is then left padded or packed, on the
CPU, where lengths are known without asking the GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .batch import Completions, deal, pack, select_completions, shared_starts


@dataclass
class Examples:
    """Pairs of a micro-batch, as the data loader hands them over.

    A class of its own: accelerate would walk through a list.
    """

    pairs: list[dict[str, Any]]


def keep_examples(pairs: list[dict[str, Any]]) -> dict[str, Examples]:
    """Collates nothing yet."""
    return {"examples": Examples(pairs)}


def pairs_in(batch: Mapping[str, Any]) -> int:
    """Pairs that a laid batch scores."""
    return len(batch["lengths"]) // 2


@dataclass
class PairCollator(DataCollatorForPreference):
    """Batches of pairs, ready for the model.

    Attributes:
        packs: One row without padding, instead of a row per sequence.
        shares: With `packs`: what chosen and rejected have in common at their start is
            in the row once.
    """

    packs: bool = False
    shares: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """One micro-batch.

        Args:
            examples: `prompt_ids`, `chosen_ids` and `rejected_ids` of each pair. A rank
                may have none left: its batch is a short row that scores nothing, as all
                ranks of an engine have to run.

        Returns:
            The model's inputs, the fields of `Completions`, `chosen_tokens`: how many
            of the scored tokens are chosen, and `num_tokens`: tokens of all sequences,
            whether padded, packed or shared; and the `examples`.
        """
        if not examples:
            return self._blank()
        return self._finish(super().torch_call(examples), examples)

    def deal(self, step: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The pairs of an optimizer step over its micro-batches, evenly by tokens.

        Args:
            step: The pairs of each micro-batch.

        Returns:
            As many batches, ready for the model.
        """
        pairs = [pair for micro_batch in step for pair in micro_batch]
        if not pairs:
            return [self._blank() for _ in step]
        padded = super().torch_call(pairs)
        dealt = deal(self._tokens(padded).tolist(), len(step))
        return [
            self._finish(_rows(padded, own), [pairs[i] for i in own])
            if own
            else self._blank()
            for own in dealt
        ]

    def _blank(self) -> dict[str, Any]:
        token = [self.pad_token_id]
        batch = self.torch_call(
            [{"prompt_ids": token, "chosen_ids": token, "rejected_ids": token}]
        )
        nothing = {name: batch[name][:0] for name in Completions._fields}
        counts = {"chosen_tokens": 0, "num_tokens": 0}
        return {**batch, **nothing, **counts, "examples": Examples([])}

    def _tokens(self, padded: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tokens of a pair in a packed row; shape (pairs,)."""
        chosen, rejected = padded["attention_mask"].sum(dim=1).chunk(2)
        tokens = chosen + rejected
        if self.shares:
            tokens -= shared_starts(padded["input_ids"], padded["attention_mask"])
        return tokens

    def _finish(
        self, padded: dict[str, torch.Tensor], pairs: list[dict[str, Any]]
    ) -> dict[str, Any]:
        batch = self._lay(padded)
        return {
            **batch,
            "chosen_tokens": int(batch["lengths"].chunk(2)[0].sum()),
            "num_tokens": int(padded["attention_mask"].sum()),
            "examples": Examples(pairs),
        }

    def _lay(self, padded: dict[str, torch.Tensor]) -> dict[str, Any]:
        if self.packs:
            return pack(padded, self.shares, self.pad_token_id, self.pad_to_multiple_of)
        ids, mask = padded["input_ids"], padded["attention_mask"]
        completions = select_completions(ids, padded["completion_mask"])._asdict()
        return {"input_ids": ids, "attention_mask": mask, "copies": mask, **completions}


def _rows(padded: dict[str, torch.Tensor], pairs: list[int]) -> dict[str, torch.Tensor]:
    """A batch of these pairs only."""
    count = len(padded["input_ids"]) // 2
    both = pairs + [count + pair for pair in pairs]
    return {name: values[both] for name, values in padded.items()}
