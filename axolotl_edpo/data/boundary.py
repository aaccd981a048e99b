"""Divides the tokens of prompt + answer where no token is cut.

A tokenizer may merge the end of a prompt with the start of an answer: "Answer: " and
"the" become "Answer", ":", " the". TRL cuts the tokens of prompt + answer after as many
tokens as the prompt has, which cuts off the first word. So the text is divided earlier.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .conversation import PairError
from .rendering import PairText

# How far back a boundary is looked for, in characters.
FARTHEST = 64

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Boundary:
    """A pair divided between two tokens.

    Attributes:
        pair: Its texts.
        moved: The end of the prompt that is now at the start of both answers.
        lengths: Tokens of the prompt, and of the longer of the two sequences.
    """

    pair: PairText
    moved: str
    lengths: tuple[int, int]


def divide(pair: PairText, tokenize: Tokenize, end: str) -> Boundary:
    """Moves the boundary of a pair back, as far as it has to be.

    Args:
        pair: The texts as a dataset type made them.
        tokenize: Returns the tokens of a text, as TRL does.
        end: What TRL adds to an answer that does not end with it.

    Raises:
        PairError: If the tokens of no shorter prompt begin both sequences.
    """
    whole = [
        tokenize(pair.prompt + answer + ("" if answer.endswith(end) else end))
        for answer in pair.answers
    ]
    longest, last = max(map(len, whole)), len(pair.prompt)
    for back in range(min(last, FARTHEST) + 1):
        prompt = tokenize(pair.prompt[: last - back])
        if all(tokens[: len(prompt)] == prompt for tokens in whole):
            moved = pair.prompt[last - back :]
            return Boundary(_moved(pair, moved), moved, (len(prompt), longest))
    raise PairError(
        "the tokens of prompt + answer do not begin with those of the prompt, nor with "
        f"those of a prompt up to {FARTHEST} characters shorter: does the tokenizer "
        f"end every text with a token? The prompt ends {pair.prompt[-40:]!r}"
    )


def _moved(pair: PairText, moved: str) -> PairText:
    if not moved:
        return pair
    prompt = pair.prompt[: -len(moved)]
    chosen, rejected = (moved + answer for answer in pair.answers)
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def repeated_start(tokenizer: Any) -> str:
    """The text that a tokenizer adds to the start of every text; "" if it adds none.

    A template that writes it, too, would have it twice.
    """
    bos = tokenizer.bos_token
    if not bos:
        return ""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return bos if begins else ""
