"""Texts, notes and lengths of a row, and the rows that each type refuses."""

import pytest
from axolotl.utils.data.rl import load_dpo
from axolotl.utils.dict import DictDefault
from helpers import templates, tiny
from helpers.templates import DEFAULT, WHOLE, said

from axolotl_edpo.data.conversation import PairError
from axolotl_edpo.data.pair_maker import LENGTHS, NOTES, PairMaker
from axolotl_edpo.data.preparation import Preparation

TOKENIZER = tiny.byte_tokenizer()
OWN = tiny.CHAT_TEMPLATE
USER = said("user", "Cats?")
YES, NO = said("assistant", "Yes."), said("assistant", "No.")
ROW = {"messages": [USER], "chosen": YES, "rejected": NO}
PROMPT = "[user]Cats?</s>[assistant]"


def chat(template: str = OWN, tokenizer=TOKENIZER, kind: str = DEFAULT, **recipe):
    """What makes pairs of a type `chat_template`."""
    return templates.maker(kind, tokenizer, template, **recipe)


def typed(kind: str | dict) -> PairMaker:
    """What makes pairs of another type of axolotl."""
    entry = {"path": "rows.jsonl", "type": kind}
    cfg = DictDefault({"datasets": [entry], "sequence_len": 64})
    name = kind if isinstance(kind, str) else "user_defined.default"
    made = Preparation(cfg, TOKENIZER).load_type(load_dpo, name, cfg, 0)
    assert made is not None
    return made[0]


# --- texts, notes and lengths ---------------------------------------------------------


def test_a_pair_that_is_as_under_dpo_has_no_note():
    assert chat()(ROW) == {
        "prompt": PROMPT,
        "chosen": "Yes.</s>",
        "rejected": "No.</s>",
        NOTES: "",
        # of the prompt: 20 letters more than its end of text; "Yes.</s>" has 5 tokens
        LENGTHS: [len("[user]Cats?[assistant]") + 1, len("[user]Cats?[assistant]") + 6],
    }


def test_lengths_count_the_end_of_text_that_trl_adds():
    made = chat("{% for m in messages %}{{ m.content }}\n{% endfor %}")(ROW)
    assert made["chosen"] == "Yes." and made[LENGTHS] == [6, 11]


def test_a_start_that_the_tokenizer_adds_is_not_in_the_text():
    begins = templates.beginning(TOKENIZER)
    made = chat("{{ bos_token }}" + OWN, begins)(ROW)
    assert made["prompt"] == PROMPT and made[NOTES] == "repeated: '<s>'"
    assert chat("{{ bos_token }}" + OWN)(ROW)["prompt"] == "<s>" + PROMPT
    alone = chat("{{ bos_token }}" + OWN, begins, WHOLE)(
        {"chosen": [YES], "rejected": [NO]}
    )
    assert (alone["prompt"], alone["chosen"]) == ("[assistant]", "Yes.</s>")


def test_a_text_that_dpo_would_train_otherwise_is_noted_from_where_it_differs():
    other = OWN.replace("[assistant]{", "[assistant] {")
    assert chat(other)(ROW)[NOTES] == (
        "template: 'Cats?</s>[assistant] |Yes.</s>' instead of "
        "'Cats?</s>[assistant]|Yes.</s>'"
    )


def test_a_type_that_fails_is_noted():
    row = {**ROW, "chosen": {**YES, "content": None, "tool_calls": [CALL]}}
    writes = OWN.replace("{{ eos", "{% if m.tool_calls %}now{% endif %}{{ eos")
    made = chat(writes)(row)
    assert made["chosen"] == "now</s>"
    assert made[NOTES].startswith("template: ")
    whole = {"chosen": [YES], "rejected": [NO]}  # axolotl renders no messages
    made = chat(kind=WHOLE)(whole)
    assert (made["prompt"], made["chosen"]) == ("[assistant]", "Yes.</s>")
    assert made[NOTES].startswith("template: it fails with ")


CALL = {"type": "function", "function": {"name": "now", "arguments": {}}}


def test_what_is_left_out_of_a_context_is_noted():
    source = OWN.replace("in messages", "in messages if m.role != 'system'")
    row = {**ROW, "messages": [said("system", "Be brief."), USER]}
    assert "left out: a message of the system" in chat(source)(row)[NOTES].split("\n")


def test_tokens_that_are_merged_are_noted():
    tokenizer = templates.merging_tokenizer()
    source = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant\n{% endif %}"
    row = {**ROW, "chosen": said("assistant", "They sleep.")}
    made = chat(source, tokenizer)(row)
    (moved,) = templates.notes(made, "merged")
    moved = templates.moved(made)
    assert moved and ("user\nCats?\nassistant\n").endswith(moved)
    assert made["chosen"] == moved + "They sleep."
    assert made["rejected"] == moved + "No."
    assert made["prompt"] + moved == "user\nCats?\nassistant\n"


@pytest.mark.parametrize("images", [["a.png"], [], None])
def test_images_beside_a_text_model_are_refused(images):
    with pytest.raises(PairError, match="a column of images, which takes a vision"):
        chat()({**ROW, "images": images})


def test_messages_without_a_type_are_left_to_trl():
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    lengths = chat()(ROW)[LENGTHS]
    assert typed("passthrough")(row) == {**row, NOTES: "", LENGTHS: lengths}


def test_texts_of_other_types_are_as_axolotl_makes_them():
    row = {"prompt": "Cats?", "chosen": "Yes.", "rejected": "No.", "n": 1}
    made = typed("chatml.prompt_pairs")(row)
    start = "<|im_start|>user\nCats?<|im_end|>\n<|im_start|>assistant\n"
    assert made["prompt"] == start and made["chosen"] == "Yes.<|im_end|>"
    assert made[NOTES] == ""
    assert made[LENGTHS] == [len(start), len(start) + len("Yes.<|im_end|>") + 1]


def test_a_pair_that_is_too_long_is_refused_by_raise_only():
    length = chat()(ROW)[LENGTHS][1]
    short = dict(sequence_len=length - 1)
    chat(**short)(ROW)
    chat(**short, excess_length_strategy="drop")(ROW)
    chat(sequence_len=length, excess_length_strategy="raise")(ROW)
    with pytest.raises(PairError) as refusal:
        chat(**short, excess_length_strategy="raise")(ROW)
    assert str(refusal.value) == (
        f"it has {length} tokens, more than `sequence_len: {length - 1}`: raise it, or "
        "set `excess_length_strategy` to `drop` or `truncate`"
    )


# --- rows that are refused ------------------------------------------------------------

TEXT = {"prompt": "Cats?", "chosen": "Yes.", "rejected": "No."}
TALK = {"chosen": [USER, YES], "rejected": [USER, NO]}
FORMAT = {
    "field_prompt": "q",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "prompt_format": "{prompt}",
    "chosen_format": "{chosen}",
    "rejected_format": "{rejected}",
}
MESSAGES = "set `type: chat_template.default` for messages, or remove the row"
REFUSED = {
    "another type": (
        "chatml.prompt_pairs",
        {"question": "Cats?", "chosen": "Yes.", "rejected": "No."},
        "it is not as this type takes it (KeyError: 'prompt'); the columns are "
        "question, chosen, rejected: set another `type`, or its `field_*` keys",
    ),
    "no answer": (
        "passthrough",
        {"prompt": "Cats?", "chosen": "Yes."},
        "`rejected` is absent, not a text; the columns are prompt, chosen: " + MESSAGES,
    ),
    "messages for a text": (
        "passthrough",
        {**TEXT, "chosen": [YES]},
        "`chosen` is a list, not a text; the columns are prompt, chosen, rejected: "
        + MESSAGES,
    ),
    "messages in a text": (
        "chatml.prompt_pairs",
        {**TEXT, "prompt": [USER]},
        "`prompt` is a list, and this type would train what Python prints of it: "
        + MESSAGES,
    ),
    "an empty answer": (
        "passthrough",
        {**TEXT, "rejected": " \n"},
        "`rejected` has no text: remove the row",
    ),
    "an empty value": (
        FORMAT,
        {"q": None, "chosen": "Yes.", "rejected": "No."},
        "`q` is empty: remove the row",
    ),
    "whole conversations beside a prompt": (
        "passthrough",
        {"prompt": [USER], **TALK},
        "`chosen` has messages of user, assistant, and after a `prompt` of messages "
        "one answer is due: set `type: chat_template.default` and `field_messages: "
        "prompt`",
    ),
    "texts in lists": (
        "passthrough",
        {"prompt": ["Cats?"], "chosen": ["Yes."], "rejected": ["No."]},
        "`chosen` has messages of None, and after a `prompt` of messages one answer is "
        "due: set `type: chat_template.default` and `field_messages: prompt`",
    ),
    "several turns": (
        "chatml.argilla_chat",
        {**TALK, "rejected": [USER, NO, USER, NO]},
        "`rejected` has 4 messages, of user, assistant, user, assistant; this type "
        "takes one question and one answer, and would leave out the rest: set `type: "
        "chat_template.argilla_chat`",
    ),
    "texts for messages": (
        "chatml.argilla_chat",
        {**TALK, "rejected": ["Cats?", "No."]},
        "`rejected` has 2 messages, of None, None; this type takes one question and "
        "one answer, and would leave out the rest: set `type: "
        "chat_template.argilla_chat`",
    ),
    "a call": (
        "llama3.argilla_chat",
        {**TALK, "rejected": [USER, {**NO, "tool_calls": [CALL]}]},
        "`rejected` calls a tool, which this type leaves out: set `type: "
        "chat_template.argilla_chat`",
    ),
    "two questions": (
        "chatml.argilla_chat",
        {**TALK, "rejected": [said("user", "Dogs?"), NO]},
        "`chosen` and `rejected` answer different conversations: message 1 is 'Cats?' "
        "in one and 'Dogs?' in the other. ε-DPO compares two answers to the same "
        "messages: remove the row",
    ),
}


@pytest.mark.parametrize(("kind", "row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_is_refused_with_the_reason(kind, row, message):
    with pytest.raises(PairError) as refusal:
        typed(kind)(row)
    assert str(refusal.value) == message


def test_a_none_that_someone_wrote_is_no_empty_value():
    row = {"q": "None of them?", "chosen": "Yes.", "rejected": "No.", "system": None}
    assert typed({**FORMAT, "field_system": "system"})(row)["prompt"] == "None of them?"
