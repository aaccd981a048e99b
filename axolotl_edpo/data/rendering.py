"""Renders a conversation with a chat template, and divides the text at the answer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from .conversation import ANSWERS, Conversation, Message, PairError

# Answers that begin differently: the texts around them are equal up to the answer.
PROBES = [{"role": "assistant", "content": text} for text in ("A probe.", "Z probe.")]


@dataclass(frozen=True)
class PairText:
    """Texts of a pair: prompt + answer is a whole conversation."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def answers(self) -> tuple[str, str]:
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
    prompt = template.render(talk.context, talk, prompt=True) if talk.context else ""
    start = len(prompt)
    if not all(text.startswith(prompt) for text in whole):
        start = _answer_start(template, talk, whole)
    pair = PairText(whole[0][:start], *(text[start:].rstrip() for text in whole))
    for name, message, text in zip(ANSWERS, talk.answers, pair.answers, strict=True):
        lost = [part for part in _parts(message) if not _is_in(part, text)]
        if lost:
            raise PairError(
                f"the chat template leaves out a part of `{name}`: {lost[0][:60]!r}: "
                "set another `chat_template` that writes it, or remove the row"
            )
    return pair


def _answer_start(template: ChatTemplate, talk: Conversation, whole: list[str]) -> int:
    """Where the answers begin, if the prompt is not how both conversations begin.

    A template may write the start of an answer otherwise than its prompt does: with an
    open `<think>`, for example. The texts up to any answer tell where answers begin.
    """
    probes = [template.render([*talk.context, probe], talk) for probe in PROBES]
    start = len(commonprefix([*probes, *whole]))
    last = _parts(talk.context[-1]) if talk.context else []
    if not all(_is_in(part, whole[0][:start]) for part in last):
        raise PairError(
            "the chat template writes earlier messages in another way if other answers "
            "follow, so the two conversations have no common prompt: set another "
            "`chat_template`"
        )
    return start


def left_out(talk: Conversation, pair: PairText) -> Iterator[str]:
    """Names what of a context or of its tools is not in the text.

    Thoughts of earlier answers are not looked for: templates leave them out on purpose.
    """
    text = pair.prompt + pair.chosen
    for message in talk.context:
        if not all(_is_in(part, text) for part in _parts(message, thoughts=False)):
            yield f"a message of the {message['role']}"
    for tool in talk.tools or ():
        name = (tool.get("function") or tool).get("name") if tool else None
        if name and name not in text:
            yield "`tools`"
            return


def _parts(message: Message, thoughts: bool = True) -> list[str]:
    """The texts of a message that a template should write."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else _texts(content)
    # a template may write the thoughts in front of the answer in another way
    parts = [text.rpartition("</think>")[2].strip() for text in texts]
    calls = message.get("tool_calls") or ()
    parts += [str((call.get("function") or call).get("name", "")) for call in calls]
    if thoughts:
        parts += [str(message.get(key) or "").strip() for key in THOUGHTS]
        parts += [
            line.strip()
            for text in texts
            for line in text.rpartition("</think>")[0].split("<think>")
        ]
    return [part for part in parts if part]


# Keys of the thoughts of an answer; templates know one of them.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def _texts(content: Any) -> list[str]:
    """Texts of a content that is a list of parts."""
    if not isinstance(content, list):
        return [str(content)]
    return [
        str(part.get("text") or "") if isinstance(part, Mapping) else str(part)
        for part in content
    ]


def _is_in(part: str, text: str) -> bool:
    """Whether a text has a part, as it is or as JSON."""
    return part in text or any(
        json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False)
    )
