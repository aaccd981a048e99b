"""The lines that show pairs: texts, or a line per token."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..data.pair_maker import NOTES
from .marks import Marks, visible
from .pair_set import SAME, TRUNCATED, PairSet
from .tokens import CUT, SCORED, Token, tokens_of

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Page:
    """Shows pairs of a set.

    Attributes:
        found: The set.
        marks: How tokens are marked.
        lists: Whether tokens are listed one a line, with their ids.
    """

    found: PairSet
    marks: Marks
    lists: bool = False

    def lines(self, note: str | None, count: int) -> Iterator[str]:
        """The first pairs, or the first that have a note.

        Args:
            note: As `PairSet.flags` takes it; None: pairs with and without notes.
            count: How many.
        """
        total = len(self.found)
        rows = np.flatnonzero(self.found.flags(note)) if note else np.arange(total)
        if note:
            yield f"{len(rows)} of {total} pairs have this note: {note}"
        if count and len(rows):
            yield self.marks.legend
        for row in rows[:count]:
            yield ""
            yield from self._pair(int(row))
        yield ""

    def _pair(self, row: int) -> Iterator[str]:
        pair, limit = self.found.pairs[row], self.found.max_length
        prompt, *answers = (pair[f"{name}_ids"] for name in ("prompt", *SIDES))
        read = partial(tokens_of, self.found.tokenizer, prompt, max_length=limit)
        chosen, rejected = map(read, answers)
        place = f"pair {row + 1} of {len(self.found)} of `{self.found.key}`"
        yield self.marks.heading(place)
        yield from _notes(pair, limit)
        yield from self._part("prompt", chosen[: len(prompt)])
        yield from self._part("chosen", chosen[len(prompt) :])
        yield from self._part("rejected", rejected[len(prompt) :])

    def _part(self, side: str, tokens: list[Token]) -> Iterator[str]:
        """The tokens of the prompt or of an answer below their counts."""
        yield self.marks.heading(f"{side}: {_counts(tokens)}")
        if self.lists:
            for token in tokens:
                yield self.marks.line(_listed(token), token.state, side)
        else:
            text = self.marks.text(tokens, side)
            yield "  " + text.replace("\n", "\n  ")


def _notes(pair: Mapping[str, Any], limit: int) -> Iterator[str]:
    """What was noted of a pair, and what its tokens tell."""
    for note in filter(None, pair[NOTES].split("\n")):
        yield f"note: {note}"
    chosen, rejected = (pair[f"{name}_ids"] for name in SIDES)
    if chosen == rejected:
        yield f"note: {SAME}: both answers have the same tokens, which teach nothing"
    longest = len(pair["prompt_ids"]) + max(len(chosen), len(rejected))
    if longest > limit:
        yield f"note: {TRUNCATED}: {longest} tokens, more than `sequence_len: {limit}`"


def _counts(tokens: list[Token]) -> str:
    """In words: how many tokens there are, are scored, and are cut."""
    states = Counter(token.state for token in tokens)
    scored = f"{len(tokens)} tokens, {states[SCORED]} scored"
    return f"{scored}, {states[CUT]} cut" if states[CUT] else scored


def _listed(token: Token) -> str:
    """Place, state, id and text of a token; its name if it adds no text."""
    text = f'"{visible(token.text)}"'.replace("\n", "")
    if not token.text:
        text = f"{token.piece}, a part of a character"
    special = ", special" if token.special else ""
    return f"{token.position:7}  {token.state:10} {token.id:7}  {text}{special}"
