"""What is read of rows of messages, and every row that is refused."""

import pytest

from axolotl_edpo.data.conversation import PairError, from_messages, from_whole

FIELDS = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
USER = {"role": "user", "content": "Cats?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROW = {"messages": [USER], "chosen": YES, "rejected": NO}
WHOLE = {"chosen": [USER, YES], "rejected": [USER, NO]}


def calling(calls) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": calls}


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"messages": "Cats?", "chosen": "Yes.", "rejected": "No."},
        {**ROW, "chosen": [YES], "rejected": [USER, NO]},
        {**ROW, "tools": None, "chat_template_kwargs": None},
        {**ROW, "tools": " ", "messages": [{**USER, "tool_calls": []}]},
    ],
    ids=["messages", "texts", "with the context", "none", "empty"],
)
def test_one_question_and_two_answers_in_every_form(row):
    talk = from_messages(row, FIELDS)
    assert talk == from_whole(WHOLE, FIELDS)
    assert talk.context == [USER] and talk.answers == (YES, NO)
    assert talk.whole() == [[USER, YES], [USER, NO]]
    assert talk.tools is None and talk.keywords == {}


def test_columns_have_the_names_of_the_recipe():
    row = {"conv": [USER], "yes": YES, "no": NO}
    fields = {"messages": "conv", "chosen": "yes", "rejected": "no"}
    assert from_messages(row, fields) == from_messages(ROW, FIELDS)


def test_keys_that_arrow_fills_with_none_are_removed():
    tool = {"function": {"name": "f", "parameters": {"a": {"type": "int", "b": None}}}}
    talk = from_messages(
        {
            "messages": [{**USER, "name": None}],
            "chosen": calling([{**CALL, "id": None}]),
            "rejected": {**NO, "tool_calls": None},
            "tools": [tool],
            "chat_template_kwargs": {"thinking": True, "other": None},
        },
        FIELDS,
    )
    assert talk.context == [USER]
    assert talk.answers == (
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        NO,
    )
    parameters = {"a": {"type": "int"}}
    assert talk.tools == [{"function": {"name": "f", "parameters": parameters}}]
    assert talk.keywords == {"thinking": True}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}],
        '[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]',
    ],
    ids=["values", "arguments as JSON", "calls as JSON"],
)
def test_calls_may_be_json_text(calls):
    talk = from_messages({**ROW, "chosen": calling(calls)}, FIELDS)
    assert talk.answers[0]["tool_calls"] == [CALL]


def test_tools_may_be_json_text():
    row = {**ROW, "tools": '[{"function": {"name": "f"}}]'}
    assert from_messages(row, FIELDS).tools == [{"function": {"name": "f"}}]


def test_a_call_without_a_function_is_left_as_it_is():
    flat = {"name": "f", "arguments": '{"x": 1}'}
    talk = from_messages({**ROW, "chosen": calling([flat])}, FIELDS)
    assert talk.answers[0]["tool_calls"] == [flat]


REFUSED = {
    "no column": (
        {"messages": [USER], "chosen": YES},
        "`rejected` is absent; the columns are messages, chosen: remove the row, or "
        "set `field_",
    ),
    "no value": ({**ROW, "chosen": None}, "`chosen` is empty; the columns are"),
    "no messages": ({**ROW, "messages": []}, "`messages` is empty; the columns are"),
    "a number": ({**ROW, "chosen": 3}, "`chosen` is a int, not a list of messages"),
    "a text in a list": (
        {**ROW, "messages": ["Cats?"]},
        "`messages`: a message has no `role`: Cats?: name the keys",
    ),
    "other keys": (
        {**ROW, "messages": [{"from": "user", "value": "Cats?"}]},
        "`messages`: a message has no `role`: {'from': 'user', 'value': 'Cats?'}",
    ),
    "another role": (
        {**ROW, "messages": [{**USER, "role": "human"}]},
        "`messages`: a message has `role: human`: name the roles system, user, assis",
    ),
    "no content": (
        {**ROW, "messages": [{"role": "user", "content": None}]},
        "`messages`: a message of the user has no `content`: name the keys",
    ),
    "an answer of the user": (
        {**ROW, "chosen": USER},
        "the last message of `chosen` is of the user, and only answers of the assist",
    ),
    "blanks": (
        {**ROW, "rejected": {**NO, "content": " \n"}},
        "`rejected` has no text: remove the row",
    ),
    "parts without text": (
        {**ROW, "rejected": {**NO, "content": [{"type": "text", "text": ""}]}},
        "`rejected` has no text: remove the row",
    ),
    "another context in an answer": (
        {**ROW, "chosen": [{**USER, "content": "Dogs?"}, YES]},
        "`chosen` has 2 messages, and those before the last are not those of `mess",
    ),
    "calls that are no JSON": (
        {**ROW, "chosen": calling("f(1)")},
        "`tool_calls` is not JSON (",
    ),
    "a call that is a text": (
        {**ROW, "chosen": calling(["f(1)"])},
        "`chosen`: `tool_calls` of a message is no list of calls with a `function`: "
        "['f(1)']",
    ),
    "a function that is a name": (
        {**ROW, "chosen": calling([{"function": "f"}])},
        "`chosen`: `tool_calls` of a message is no list of calls",
    ),
    "arguments that are no JSON": (
        {**ROW, "chosen": calling([{"function": {"name": "f", "arguments": "x=1"}}])},
        "arguments of a tool call is not JSON (",
    ),
    "tools that are no JSON": ({**ROW, "tools": "f"}, "`tools` is not JSON ("),
    "tools that are no list": (
        {**ROW, "tools": '{"name": "f"}'},
        "`tools` is a dict: write a list of functions, or JSON text of such a list",
    ),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_is_refused_with_the_reason(row, message):
    with pytest.raises(PairError) as refusal:
        from_messages(row, FIELDS)
    assert message in str(refusal.value)


THOUGHT = {**YES, "reasoning_content": "Hm."}
CONTEXTS = {
    "text": ([USER], [{**USER, "content": "Dogs?"}], "1 is 'Cats?' in one and 'Dogs?'"),
    "role": ([USER], [{**USER, "role": "system"}], "1 is 'user' in one and 'system' i"),
    "longer": ([USER, NO], [USER], "2 is 'No.' in one and absent in the other"),
    "calls": (
        [USER, calling([CALL])],
        [USER, {**YES, "content": ""}],
        "2 is \"[{'type': 'function', 'function': {'name\" in one and 'None' in the",
    ),
    "thoughts": ([USER, THOUGHT], [USER, YES], "2 is 'Hm.' in one and 'None' in the"),
}


@pytest.mark.parametrize(("one", "other", "message"), CONTEXTS.values(), ids=CONTEXTS)
def test_answers_to_different_conversations_are_refused(one, other, message):
    row = {"chosen": [*one, YES], "rejected": [*other, NO]}
    with pytest.raises(PairError) as refusal:
        from_whole(row, FIELDS)
    said = "`chosen` and `rejected` answer different conversations: message " + message
    assert str(refusal.value).startswith(said)
    assert "two answers to the same messages: remove the row" in str(refusal.value)
