"""Marks of tokens: in colour, or with signs where there are no colours.

Characters that cannot be seen are written out, so that a text of the data cannot move
the cursor, and a blank that is not one is found.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import click

from .tokens import CUT, SCORED, UNSCORED, Token

# Signs for characters that cannot be seen. A newline also begins a line.
SIGNS = {"\n": "⏎\n", "\t": "⇥"}
BOUNDARY = "│"
# State of tokens -> what stands around them.
AROUND = {UNSCORED: ("", ""), SCORED: ("⟦", "⟧"), CUT: ("⟪", "⟫")}
COLOURS = {"chosen": "green", "rejected": "red"}


class Marks(Protocol):
    """A way to mark tokens."""

    legend: str

    def text(self, tokens: Sequence[Token], side: str) -> str:
        """The text of some tokens with their boundaries.

        Args:
            tokens: Neighbours in a sequence.
            side: `prompt`, `chosen` or `rejected`.
        """

    def line(self, line: str, state: str, side: str) -> str:
        """A line about one token."""

    def heading(self, line: str) -> str:
        """A line that begins a part."""


class Plain:
    """With signs, for files and terminals without colours."""

    legend = (
        "⟦scored⟧  not scored  ⟪cut by `sequence_len`⟫  │ between tokens  ⏎ newline"
    )

    def text(self, tokens: Sequence[Token], side: str) -> str:
        """As `Marks.text`: groups of one state are in brackets."""
        groups = groupby(tokens, key=lambda token: token.state)
        return BOUNDARY.join(_in_brackets(state, group) for state, group in groups)

    def line(self, line: str, state: str, side: str) -> str:
        """The line as it is: it names the state."""
        return line

    def heading(self, line: str) -> str:
        """The line as it is."""
        return line


def _in_brackets(state: str, tokens: Iterator[Token]) -> str:
    begin, end = AROUND[state]
    return begin + BOUNDARY.join(visible(token.text) for token in tokens) + end


class Coloured:
    """In colour, every other token underlined, special tokens bold."""

    def __init__(self) -> None:
        words = [
            self.line("scored of chosen", SCORED, "chosen"),
            self.line("scored of rejected", SCORED, "rejected"),
            self.line("not scored", UNSCORED, "prompt"),
            self.line("cut by `sequence_len`", CUT, "prompt"),
            click.style("every other token", underline=True),
            click.style("special token", bold=True),
            "⏎ newline",
        ]
        self.legend = "  ".join(words)

    def text(self, tokens: Sequence[Token], side: str) -> str:
        """As `Marks.text`."""
        return "".join(
            click.style(
                visible(token.text),
                underline=token.position % 2 == 1,
                bold=token.special,
                **_style(token.state, side),
            )
            for token in tokens
        )

    def line(self, line: str, state: str, side: str) -> str:
        """The whole line in the colour of its token."""
        return click.style(line, **_style(state, side))

    def heading(self, line: str) -> str:
        """The line in bold."""
        return click.style(line, bold=True)


def _style(state: str, side: str) -> dict[str, Any]:
    if state == SCORED:
        return {"fg": COLOURS[side]}
    return {"fg": "bright_black", "strikethrough": state == CUT}


def visible(text: str) -> str:
    """A text in which every character can be seen, apart from blanks."""
    return "".join(SIGNS.get(char) or _written_out(char) for char in text)


def _written_out(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode()
