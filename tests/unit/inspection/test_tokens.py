"""tokens.py: a token's text and state are those of its sequence."""

import pytest
from helpers import tiny
from tokenizers import AddedToken

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.inspection.tokens import (
    CUT,
    SCORED,
    UNSCORED,
    special_ids,
    texts_of,
    tokens_of,
)

PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    {"prompt_ids": [], "chosen_ids": [5, 6, 7, 8, 9], "rejected_ids": [6]},
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9, 10, 11]},
]


@pytest.mark.parametrize("max_length", [4, 5, 9])
@pytest.mark.parametrize("pair", PAIRS, ids=["a prompt", "none", "a long one"])
def test_scored_tokens_are_those_that_the_collator_scores(pair, max_length):
    batch = PairCollator(pad_token_id=0, max_length=max_length)([pair])
    expected = batch["targets"].split(batch["lengths"].tolist())
    tokenizer = tiny.reference_tokenizer()
    for name, targets in zip(("chosen_ids", "rejected_ids"), expected, strict=True):
        tokens = tokens_of(tokenizer, pair["prompt_ids"], pair[name], max_length)
        assert [t.id for t in tokens] == pair["prompt_ids"] + pair[name]
        assert [t.id for t in tokens if t.state == SCORED] == targets.tolist()
        assert sum(t.state == CUT for t in tokens) == max(len(tokens) - max_length, 0)


def test_what_is_beyond_the_limit_is_cut_and_the_prompt_is_not_scored():
    tokens = tokens_of(tiny.reference_tokenizer(), [5, 6], [7, 8, 1], 4)
    states = [UNSCORED, UNSCORED, SCORED, SCORED, CUT]
    assert [token.state for token in tokens] == states
    assert [token.piece for token in tokens] == ["t5", "t6", "t7", "t8", "</s>"]
    assert [token.text for token in tokens] == ["t5", " t6", " t7", " t8", " </s>"]
    assert [token.special for token in tokens] == [False] * 4 + [True]
    assert [token.position for token in tokens] == [0, 1, 2, 3, 4]


def test_bytes_of_a_character_are_its_text_at_the_last_of_them():
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("aé€\n</s>")["input_ids"]
    texts = texts_of(tokenizer, ids)
    assert texts == ["a", "", "é", "", "", "€", "\n", "</s>"]
    assert "".join(texts_of(tokenizer, ids[:2])) == "a\N{REPLACEMENT CHARACTER}"
    assert texts_of(tokenizer, []) == []


def test_tokens_that_only_the_vocabulary_calls_special_are():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("plain")])
    found = {*tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))}
    assert found == {"<s>", "</s>", "<pad>", "<tool>"}
