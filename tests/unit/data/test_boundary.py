"""Where a pair is divided, so that no token is cut."""

import re

import pytest
from helpers import templates, tiny

from axolotl_edpo.data.boundary import FARTHEST, divide, repeated_start
from axolotl_edpo.data.conversation import PairError
from axolotl_edpo.data.rendering import PairText


def words(text: str) -> list[str]:
    """Tokens that are words, with the blank before them as GPT-2's have it."""
    return re.findall(r" ?[^ ]+| ", text)


def test_a_boundary_between_two_tokens_stays():
    pair = PairText("What? It", " is.", " was not.")
    found = divide(pair, words, "</s>")
    assert found.pair == pair and found.moved == ""
    assert found.lengths == (2, 4)  # "What?" " It"; " was" " not.</s>"


def test_a_boundary_that_cuts_a_token_moves_to_its_start():
    found = divide(PairText("What? It ", "is.", "was."), words, "</s>")
    assert found.moved == " "
    assert found.pair == PairText("What? It", " is.", " was.")


@pytest.mark.parametrize("answers", [("self.", " is."), (" is.", "self.")])
def test_one_answer_that_is_merged_suffices(answers):
    found = divide(PairText("What? It", *answers), words, "</s>")
    assert found.moved == " It"
    assert found.pair == PairText("What?", *(" It" + answer for answer in answers))


def test_an_end_of_text_is_there_once():
    both = divide(PairText("a", " b", " b </s>"), words, "</s>")
    assert both.lengths == (1, 3)
    assert divide(PairText("a", " b </s>", " b </s>"), words, " </s>").lengths[1] == 3


def test_a_short_prompt_may_move_whole():
    found = divide(PairText("It", "self", "s"), words, "</s>")
    assert found.pair == PairText("", "Itself", "Its")


def test_a_tokenizer_that_ends_every_text_is_refused():
    def ended(text: str) -> list[str]:
        return [*text, "</s>"]

    with pytest.raises(PairError, match="does the tokenizer end every text with a tok"):
        divide(PairText("It is. " * 20, "a", "b"), ended, "</s>")


def test_a_boundary_is_not_looked_for_too_far_back():
    far = PairText("a " + "b" * FARTHEST, "b", " c")
    with pytest.raises(PairError, match=r"up to 64 characters shorter.*ends 'b{40}'"):
        divide(far, words, "</s>")
    near = PairText("a " + "b" * (FARTHEST - 1), "b", " c")
    assert divide(near, words, "</s>").pair.prompt == "a"


def test_a_tokenizer_that_begins_texts_is_known():
    tokenizer = tiny.byte_tokenizer()
    assert repeated_start(tokenizer) == ""
    assert repeated_start(templates.beginning(tokenizer)) == "<s>"
    tokenizer.bos_token = None
    assert repeated_start(tokenizer) == ""
