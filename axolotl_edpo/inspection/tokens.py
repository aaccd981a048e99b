"""The tokens of a pair: the text of each, and which are scored.

A sequence is prompt + answer. Of it, `sequence_len` keeps the first tokens. Scored are
those of the answer that are kept; no position predicts the first token of a sequence.

    prompt     p  p  p                not scored
    answer              a  a  a       scored
    beyond sequence_len          a a  cut
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

# What becomes of a token.
UNSCORED, SCORED, CUT = "not scored", "scored", "cut"
# What a decoder writes for bytes that are no whole character.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Token(NamedTuple):
    """A token of a sequence.

    Attributes:
        position: Its place in the sequence, from 0 on.
        id: Its number in the vocabulary.
        piece: Its name in the vocabulary.
        text: What it adds to the text. If several tokens make a character, the last
            one adds it.
        special: Whether it is a special token, not text that looks like one.
        state: UNSCORED, SCORED or CUT.
    """

    position: int
    id: int
    piece: str
    text: str
    special: bool
    state: str


def tokens_of(
    tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], max_length: int
) -> list[Token]:
    """The tokens of a sequence.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: `prompt_ids` of a pair.
        answer: `chosen_ids` or `rejected_ids`.
        max_length: Most tokens of a sequence.

    Returns:
        As many as prompt and answer have.
    """
    ids = [*prompt, *answer]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    special = special_ids(tokenizer)
    return [
        Token(i, id, piece, text, id in special, _state(i, len(prompt), max_length))
        for i, (id, piece, text) in enumerate(
            zip(ids, pieces, texts_of(tokenizer, ids), strict=True)
        )
    ]


def _state(position: int, prompt: int, max_length: int) -> str:
    if position >= max_length:
        return CUT
    return SCORED if position >= max(prompt, 1) else UNSCORED


def special_ids(tokenizer: Any) -> set[int]:
    """Special tokens, those that only the vocabulary marks as special among them."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text.

    A token may have another text alone than after others. So each is decoded with the
    one before it. A token that ends within a character adds nothing.

    Args:
        tokenizer: A tokenizer of transformers.
        ids: A sequence.

    Returns:
        As many as ids.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(
            ids[start:end],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    texts, before, start = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(before, end)
        if text.endswith(INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(decode(before, start)) :])
        before, start = start, end
    return texts
