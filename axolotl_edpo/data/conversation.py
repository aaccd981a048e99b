"""Reads a row of messages: the context of two answers, and the answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Message = dict[str, Any]

# Roles that axolotl's `chat_template` types accept.
ROLES = ("system", "user", "assistant", "tool")
ANSWERS = ("chosen", "rejected")
# Keys of the thoughts of an answer; templates know one of them.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class PairError(ValueError):
    """A row that cannot be trained on as it is written: the reason and a remedy."""


@dataclass(frozen=True)
class Conversation:
    """Two answers to one context.

    Attributes:
        context: All messages before the answer.
        answers: The message chosen and the message rejected.
        tools: The functions that the model may call, as JSON schemas.
        keywords: Further variables of the chat template, such as `enable_thinking`.
    """

    context: list[Message]
    answers: tuple[Message, Message]
    tools: list[Any] | None
    keywords: dict[str, Any]

    def whole(self) -> list[list[Message]]:
        """The two conversations, each with its answer."""
        return [[*self.context, answer] for answer in self.answers]


def from_messages(row: Mapping[str, Any], fields: Mapping[str, str]) -> Conversation:
    """Reads a row of `chat_template.default`: messages, and an answer or a list of it.

    Args:
        row: A row of the data.
        fields: Column names of `messages`, `chosen` and `rejected`.

    Raises:
        PairError: If a message is missing or would be left out.
    """
    found = _column(row, fields["messages"])
    if isinstance(found, str):
        found = [{"role": "user", "content": found}]
    context, answers = _messages(found, fields["messages"]), []
    for column in (fields["chosen"], fields["rejected"]):
        answer = _column(row, column)
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        *before, last = _messages(
            [answer] if isinstance(answer, Mapping) else answer, column
        )
        if before and _said(before) != _said(context):
            raise PairError(
                f"`{column}` has {len(before) + 1} messages, and those before the last "
                f"are not those of `{fields['messages']}`: put them there, or set "
                "`type: chat_template.argilla_chat` for whole conversations"
            )
        answers.append(_answer(last, column))
    return _conversation(row, context, answers)


def from_whole(row: Mapping[str, Any], fields: Mapping[str, str]) -> Conversation:
    """Reads a row of `chat_template.argilla_chat`: two whole conversations.

    Args:
        row: A row of the data.
        fields: Column names of `chosen` and `rejected`.

    Raises:
        PairError: If a message is missing, or the two contexts differ.
    """
    columns = [fields[name] for name in ANSWERS]
    whole = [_messages(_column(row, column), column) for column in columns]
    require_same_context(whole[0][:-1], whole[1][:-1], columns)
    answers = [_answer(m[-1], name) for m, name in zip(whole, columns, strict=True)]
    return _conversation(row, whole[0][:-1], answers)


def require_same_context(
    chosen: Sequence[Message], rejected: Sequence[Message], columns: Sequence[str]
) -> None:
    """Refuses answers to different contexts: one of them would be scored after both.

    Raises:
        PairError: Names the first message that differs.
    """
    both = zip_longest(_said(chosen), _said(rejected), fillvalue=())
    for number, (a, b) in enumerate(both, 1):
        if a != b:
            one, other = _differing_parts(a, b)
            raise PairError(
                f"`{columns[0]}` and `{columns[1]}` answer different conversations: "
                f"message {number} is {one} in one and {other} in the other. ε-DPO "
                "compares two answers to the same messages: remove the row"
            )


def _differing_parts(one: tuple, other: tuple) -> tuple[str, str]:
    """Quotes the first part in which two messages differ; one of them may be absent.

    Args:
        one: A message as `_said` returns it; empty if it is absent.
        other: The other message.
    """
    if not (one and other):
        return _quoted(one), _quoted(other)
    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return _quoted(one[place:]), _quoted(other[place:])


def _quoted(said: tuple) -> str:
    return repr(str(said[0])[:40]) if said else "absent"


def _conversation(
    row: Mapping[str, Any], context: list[Message], answers: list[Message]
) -> Conversation:
    keywords = without_none(row.get("chat_template_kwargs") or {})
    return Conversation(context, (answers[0], answers[1]), _tools(row), keywords)


def _column(row: Mapping[str, Any], name: str) -> Any:
    """Value of a column, which must not be empty."""
    value = row.get(name)
    if value is None or value in ("", [], {}):
        raise PairError(
            f"`{name}` is {'absent' if name not in row else 'empty'}; the columns are "
            f"{', '.join(row)}: remove the row, or set `field_*` of the entry"
        )
    return value


def _messages(found: Any, column: str) -> list[Message]:
    """Cleans messages: Arrow fills keys that only other rows have with None."""
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise PairError(
            f"`{column}` is a {type(found).__name__}, not a list of messages: set "
            "another `type`; `chat_template.default` takes a list and two texts"
        )
    return [_message(message, column) for message in found]


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, Mapping) or message.get("role") is None:
        raise PairError(
            f"`{column}`: a message has no `role`: {str(message)[:60]}: name the keys "
            "of messages `role` and `content`"
        )
    clean = {k: v for k, v in message.items() if v is not None and v != []}
    if clean["role"] not in ROLES:
        raise PairError(
            f"`{column}`: a message has `role: {clean['role']}`: name the roles "
            f"{', '.join(ROLES)}"
        )
    if "tool_calls" in clean:
        clean["tool_calls"] = _tool_calls(clean["tool_calls"], column)
    elif "content" not in clean:
        raise PairError(
            f"`{column}`: a message of the {clean['role']} has no `content`: name the "
            "keys of messages `role` and `content`, or remove the row"
        )
    clean.setdefault("content", "")
    return clean


def _tool_calls(calls: Any, column: str) -> list[Message]:
    """Calls, which may be JSON text as their arguments may."""
    if isinstance(calls, str):
        calls = _json(calls, "`tool_calls`")
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise PairError(
            f"`{column}`: `tool_calls` of a message is no list of calls with a "
            f"`function`: {str(calls)[:60]}: write them as the chat template takes them"
        )
    return [_tool_call(call) for call in calls]


def _is_call(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(
        call.get("function") or call, Mapping
    )


def _tool_call(call: Mapping[str, Any]) -> Message:
    """A call with its arguments read from JSON text, as axolotl's SFT types do."""
    call = without_none(call)
    function = call.get("function") or {}
    if isinstance(function.get("arguments"), str):
        arguments = _json(function["arguments"], "arguments of a tool call")
        return {**call, "function": {**function, "arguments": arguments}}
    return dict(call)


def _answer(message: Message, column: str) -> Message:
    if message["role"] != "assistant":
        raise PairError(
            f"the last message of `{column}` is of the {message['role']}, and only "
            "answers of the assistant are trained: remove the row"
        )
    has_text = any(text.strip() for text in texts_of(message))
    if not (has_text or message.get("tool_calls")):
        raise PairError(f"`{column}` has no text: remove the row")
    return message


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "`tools`") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise PairError(
            f"`tools` is a {type(tools).__name__}: write a list of functions, or JSON "
            "text of such a list"
        )
    return without_none(tools) or None


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PairError(f"{name} is not JSON ({error}): {text[:60]!r}") from None


def without_none(value: Any) -> Any:
    """Removes keys without a value, at any depth."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [*map(without_none, value)] if isinstance(value, list) else value


def texts_of(message: Message) -> list[str]:
    """The texts of a message, whose content may be a list of parts."""
    content = message["content"]
    if not isinstance(content, list):
        return [str(content)]
    return [
        str(part.get("text") or "") if isinstance(part, Mapping) else str(part)
        for part in content
    ]


def _said(messages: Sequence[Message]) -> list[tuple]:
    """Text, role, calls and thoughts of each message: if they are equal, so is it."""
    keys = ("content", "role", "tool_calls", *THOUGHTS)
    return [tuple(map(message.get, keys)) for message in messages]


def roles_of(messages: Sequence[Any]) -> list[str]:
    """The role of each message; "None" of what is no message."""
    return [
        str(message.get("role") if isinstance(message, Mapping) else None)
        for message in messages
    ]
