"""Renders a conversation with a chat template, and divides the text at the answer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from .conversation import (
    ANSWERS,
    THOUGHTS,
    Conversation,
    Message,
    PairError,
    texts_of,
)

# Answers that begin differently: the texts around them are equal up to the answer.
PROBES = [{"role": "assistant", "content": text} for text in ("A probe.", "Z probe.")]
# Marks the end of a message's text: no text has this character.
MARK = "\ue0ed"


@dataclass(frozen=True)
class PairText:
    """Texts of a pair: prompt + answer is a whole conversation."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def answers(self) -> tuple[str, str]:
        """The text of the chosen and of the rejected answer."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the variables that the recipe sets for it.

    Attributes:
        tokenizer: A tokenizer of transformers.
        source: The template; None for that of the tokenizer.
        keywords: `chat_template_kwargs` of the recipe.
    """

    tokenizer: Any
    source: str | None
    keywords: Mapping[str, Any]

    def render(
        self, messages: list[Message], talk: Conversation, prompt: bool = False
    ) -> str:
        """The text of some messages.

        Args:
            messages: A conversation, or its context.
            talk: The conversation that they are part of: its tools and keywords.
            prompt: Whether the start of an answer is added.

        Raises:
            PairError: Says what the template says.
        """
        return self._apply(messages, talk, prompt, tokenize=False)

    def tokens(
        self, messages: list[Message], talk: Conversation, prompt: bool = False
    ) -> list[int]:
        """The tokens of some messages, as TRL makes them; see `render`."""
        made = self._apply(messages, talk, prompt, tokenize=True, return_dict=True)
        return made["input_ids"]

    def _apply(
        self, messages: list[Message], talk: Conversation, prompt: bool, **how: bool
    ) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=talk.tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                **how,
                **{**self.keywords, **talk.keywords},
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
        ) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise PairError(
                f"the chat template refuses messages of {roles}: {error}: change the "
                "row, or set another `chat_template`"
            ) from error


def render_pair(template: ChatTemplate, talk: Conversation) -> PairText:
    """The texts of a pair, as the template writes the two whole conversations.

    White space at the end of an answer is removed, as axolotl does.

    Raises:
        PairError: If the template leaves out an answer, or changes the context with it.
    """
    whole = [template.render(messages, talk) for messages in talk.whole()]
    start = _prompt_end(template, talk, whole)
    pair = PairText(whole[0][:start], *(text[start:].rstrip() for text in whole))
    for name, message, text in zip(ANSWERS, talk.answers, pair.answers, strict=True):
        lost = _lost(message, text)
        if lost:
            raise PairError(
                f"the chat template leaves out a part of `{name}`: {lost[0][:60]!r}: "
                "set another `chat_template` that writes it, or remove the row"
            )
    return pair


def _prompt_end(template: ChatTemplate, talk: Conversation, whole: list[str]) -> int:
    """How long the prompt is, with which both conversations begin.

    A template may write the start of an answer otherwise than its prompt does: with an
    open `<think>`, for example. The texts up to any answer tell where answers begin.
    """
    if talk.context:
        prompt = template.render(talk.context, talk, prompt=True)
        if all(text.startswith(prompt) for text in whole):
            return len(prompt)
    probes = [template.render([*talk.context, probe], talk) for probe in PROBES]
    start = len(commonprefix([*probes, *whole]))
    if start < _context_end(template, talk, probes[0]):
        raise PairError(
            "the chat template writes earlier messages in another way if other answers "
            "follow, so the two conversations have no common prompt: set another "
            "`chat_template`"
        )
    return start


def _context_end(template: ChatTemplate, talk: Conversation, probe: str) -> int:
    """Where the text of the last message before a probe ends; 0 if none is written."""
    for last in reversed(range(len(talk.context))):
        context = [*talk.context]
        context[last] = _marked(context[last])
        marked = template.render([*context, PROBES[0]], talk)
        if marked != probe:
            return len(commonprefix([marked, probe]))
    return 0


def _marked(message: Message) -> Message:
    """A message whose text ends with MARK, after which a template may trim."""
    content = message["content"]
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": MARK}]}
    return {**message, "content": str(content).rstrip() + MARK}


def _lost(message: Message, text: str) -> list[str]:
    """The parts of an answer that are missing in a text.

    Two parts may be equal, or one may contain the other. So a place of the text counts
    for one part only, and the longest part is looked for first.
    """
    lost = []
    for part in sorted(_parts(message), key=len, reverse=True):
        found = next((form for form in _forms(part) if form in text), None)
        if found is None:
            lost.append(part)
        else:
            text = text.replace(found, "\0", 1)
    return lost


def left_out(talk: Conversation, pair: PairText) -> Iterator[str]:
    """Names messages of the context, and `tools`, that the text of a pair leaves out.

    Thoughts of earlier answers are not looked for: templates leave them out on purpose.

    Args:
        talk: The conversation.
        pair: Its text, as a template wrote it.

    Yields:
        Names for a message to the user.
    """
    text = pair.prompt + pair.chosen
    for message in talk.context:
        parts = [*_parts(message, thoughts=False), *_arguments(message)]
        if not all(_is_in(part, text) for part in parts):
            yield f"a message of the {message['role']}"
    for tool in talk.tools or ():
        name = (tool.get("function") or tool).get("name") if tool else None
        if name and name not in text:
            yield "`tools`"
            return


def _parts(message: Message, thoughts: bool = True) -> list[str]:
    """The texts of a message that a template should write."""
    halves = [text.rpartition("</think>") for text in texts_of(message)]
    # a template may write the thoughts in front of the answer in another way
    parts = [answer.strip() for _, _, answer in halves]
    calls = message.get("tool_calls") or ()
    parts += [str((call.get("function") or call).get("name", "")) for call in calls]
    if thoughts:
        # data have the same thoughts under several keys, and templates write one
        told = {str(message.get(key) or "").strip() for key in THOUGHTS}
        told |= {line.strip() for head, *_ in halves for line in head.split("<think>")}
        parts += sorted(told)
    return [part for part in parts if part]


def _arguments(message: Message) -> Iterator[str]:
    """The arguments of a message's tool calls that are text.

    Names of functions are not among them: `tools` may contain these, too.
    """
    for call in message.get("tool_calls") or ():
        given = (call.get("function") or call).get("arguments")
        values = given.values() if isinstance(given, Mapping) else ()
        yield from (value for value in values if isinstance(value, str))


def _forms(part: str) -> Iterator[str]:
    """A text as it is, and as JSON."""
    yield part
    for ascii_only in (True, False):
        yield json.dumps(part, ensure_ascii=ascii_only)[1:-1]


def _is_in(part: str, text: str) -> bool:
    return any(form in text for form in _forms(part))
