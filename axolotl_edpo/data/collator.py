"""TRL's collator, and the rows made of what it returns.

Truncation, padding and masks are TRL's. Packed rows are laid from lists of tokens: of
pairs that need no truncation TRL's collator would only make tensors. Both on the CPU,
where lengths are known without asking the GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference

from .packing import (
    Completions,
    Pair,
    TokenSequence,
    deal,
    pack_pairs,
    pairs_of,
    select_completions,
)


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
        if self.packs:
            return self._packed(examples, self._pairs(examples))
        return self._padded(examples)

    def deal(self, step: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The pairs of an optimizer step over its micro-batches, evenly by tokens.

        Args:
            step: The pairs of each micro-batch.

        Returns:
            As many batches, ready for the model.
        """
        examples = [example for micro_batch in step for example in micro_batch]
        pairs = self._pairs(examples)
        dealt = deal([pair.tokens for pair in pairs], len(step))
        return [
            self._of([examples[i] for i in own], [pairs[i] for i in own])
            for own in dealt
        ]

    def _of(self, examples: list[dict[str, Any]], pairs: list[Pair]) -> dict[str, Any]:
        if examples and self.packs:
            return self._packed(examples, pairs)
        return self.torch_call(examples)

    def _blank(self) -> dict[str, Any]:
        token = [self.pad_token_id]
        batch = self.torch_call(
            [{"prompt_ids": token, "chosen_ids": token, "rejected_ids": token}]
        )
        nothing = {name: batch[name][:0] for name in Completions._fields}
        counts = {"chosen_tokens": 0, "num_tokens": 0}
        return {**batch, **nothing, **counts, "examples": Examples([])}

    def _pairs(self, examples: list[dict[str, Any]]) -> list[Pair]:
        """Prompts and answers put together, and truncated as TRL does it."""
        long = [example for example in examples if self._is_long(example)]
        cut = pairs_of(super().torch_call(long), self.shares) if long else []
        truncated = iter(cut)
        return [
            next(truncated) if self._is_long(example) else self._pair(example)
            for example in examples
        ]

    def _is_long(self, example: dict[str, Any]) -> bool:
        """Whether TRL truncates it."""
        if self.max_length is None:
            return False
        answer = max(len(example["chosen_ids"]), len(example["rejected_ids"]))
        return len(example["prompt_ids"]) + answer > self.max_length

    def _pair(self, example: dict[str, Any]) -> Pair:
        prompt = example["prompt_ids"]
        chosen, rejected = (
            TokenSequence(prompt + example[answer], len(prompt))
            for answer in ("chosen_ids", "rejected_ids")
        )
        return Pair.of(chosen, rejected, self.shares)

    def _packed(
        self, examples: list[dict[str, Any]], pairs: list[Pair]
    ) -> dict[str, Any]:
        return {
            **pack_pairs(pairs, self.pad_token_id, self.pad_to_multiple_of),
            "chosen_tokens": sum(pair.chosen.scored for pair in pairs),
            "num_tokens": sum(len(one.ids) for pair in pairs for one in pair[:2]),
            "examples": Examples(examples),
        }

    def _padded(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        padded = super().torch_call(examples)
        ids, mask = padded["input_ids"], padded["attention_mask"]
        completions = select_completions(ids, padded["completion_mask"])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "copies": mask,
            **completions._asdict(),
            "chosen_tokens": int(completions.lengths.chunk(2)[0].sum()),
            "num_tokens": int(mask.sum()),
            "examples": Examples(examples),
        }
