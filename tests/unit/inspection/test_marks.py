"""marks.py: scored tokens, boundaries and what cannot be seen are visible."""

import click
import pytest

from axolotl_edpo.inspection.marks import Coloured, Plain, visible
from axolotl_edpo.inspection.tokens import CUT, SCORED, UNSCORED, Token

WORDS = [("a", UNSCORED), (" b", SCORED), ("\n", SCORED), ("</s>", CUT)]
TOKENS = [
    Token(i, 7, word, word, word == "</s>", state)
    for i, (word, state) in enumerate(WORDS)
]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("two words", "two words"),
        ("a\n\tb\r", "a⏎\n⇥b\\r"),
        ("\x1b[31m", "\\x1b[31m"),  # would colour the terminal
        ("a\u00a0b\u200b", "a\\xa0b\\u200b"),
        ("é€漢", "é€漢"),
    ],
    ids=repr,
)
def test_what_cannot_be_seen_is_written_out(text, seen):
    assert visible(text) == seen


def test_without_colours_states_are_in_brackets_and_tokens_apart():
    assert Plain().text(TOKENS, "chosen") == "a│⟦ b│⏎\n⟧│⟪</s>⟫"
    assert Plain().text([], "chosen") == ""
    assert Plain().line("a line", SCORED, "chosen") == "a line"


@pytest.mark.parametrize(("side", "code"), [("chosen", 32), ("rejected", 31)])
def test_colours_tell_sides_states_and_every_other_token(side, code):
    text = Coloured().text(TOKENS, side)
    assert click.unstyle(text) == "a b⏎\n</s>"
    first, second, third, last = text.split("\x1b[0m")[:4]
    assert first.startswith("\x1b[90m") and "\x1b[24m" in first
    assert f"\x1b[{code}m" in second and "\x1b[4m" in second
    assert f"\x1b[{code}m" in third and "\x1b[24m" in third
    # special, underlined, struck through
    assert all(f"\x1b[{n}m" in last for n in (90, 1, 4, 9))


def test_the_legend_is_in_its_own_colours():
    legend = Coloured().legend
    assert "\x1b[32mscored of chosen\x1b[0m" in legend.replace("\x1b[29m", "")
    assert click.unstyle(legend).startswith("scored of chosen  scored of rejected  not")
