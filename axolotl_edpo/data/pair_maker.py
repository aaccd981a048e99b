"""`PairMaker`: turns a row of a data set into the texts of a pair.

axolotl's dataset types read the row. For `chat_template` types, the pair gets the text
that the chat template writes for the two whole conversations. A row is refused if a
part of it would be lost.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .boundary import divide
from .columns import IDS
from .conversation import (
    ANSWERS,
    Conversation,
    Message,
    PairError,
    from_messages,
    from_whole,
    require_same_context,
    roles_of,
)
from .images import ImageTokens, has_images
from .rendering import ChatTemplate, PairText, left_out, render_pair

# Columns of the texts of a pair.
TEXTS = ("prompt", *ANSWERS)
# Two more columns that a row gets. NOTES: lines "kind: detail", one for each way in
# which the pair differs from that of `rl: dpo`. LENGTHS: the number of tokens of the
# prompt, and of the longer of the two sequences.
NOTES, LENGTHS = "edpo_notes", "edpo_lengths"
# Kinds of notes.
TEMPLATE, MERGED, REPEATED = "template", "merged", "repeated"
LEFT_OUT = "left out"
# Columns of messages without a type.
WITHOUT_TYPE = {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}
# Types whose rows are one question and one answer, each a message of a list.
TWO_MESSAGES = ("argilla_chat", "ultra")

MESSAGES_TYPE = "set `type: chat_template.default` and `field_messages: prompt`"
MESSAGES_REMEDY = "set `type: chat_template.default` for messages, or remove the row"

IMAGE_REMEDY = (
    "; images are due in a column `images`, and in messages before the answer"
)

Read = Callable[[Mapping[str, Any], Mapping[str, str]], Conversation]
CHAT_TYPES: dict[str, Read] = {
    "chat_template.default": from_messages,
    "chat_template.argilla_chat": from_whole,
}


@dataclass(frozen=True)
class PairMaker:
    """From a row of a data set to the texts of a pair.

    Attributes:
        kind: `type` of the data set's entry, such as `chat_template.default`.
        transform: axolotl's function of that type.
        fields: Column names of messages, chosen and rejected, for `chat_template`.
        template: The chat template of the recipe.
        start: The text that its tokenizer adds to the start of every text.
        images: Tokenizes pairs with images; None beside a text model.
        raise_above: Most tokens of a sequence that `excess_length_strategy: raise`
            accepts; None with another strategy.
    """

    kind: str
    transform: Callable[[dict], Mapping[str, Any]]
    fields: Mapping[str, str]
    template: ChatTemplate
    start: str
    images: ImageTokens | None
    raise_above: int | None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its texts, notes and lengths.

        Raises:
            PairError: If the row cannot be trained on as it is written.
        """
        row = dict(row)
        if has_images(row):
            return self._with_images(row)
        made: dict[str, Any] = {}
        if self.kind in CHAT_TYPES:
            pair, notes = self._render(row)
        else:
            made, notes = self._read(row), []
            if _is_messages(made):
                return self._left_to_trl(made)
            pair = PairText(*(made[name] for name in TEXTS))
        if self.start and pair.prompt.startswith(self.start):
            pair = replace(pair, prompt=pair.prompt.removeprefix(self.start))
            notes.append(f"{REPEATED}: {self.start!r}")
        divided = divide(pair, self._tokenize, self.template.tokenizer.eos_token)
        self._require_length(divided.lengths[1])
        if divided.moved:
            notes.append(f"{MERGED}: {divided.moved!r}")
        texts = vars(divided.pair)
        return {**made, **texts, NOTES: "\n".join(notes), LENGTHS: [*divided.lengths]}

    def _with_images(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with images, which axolotl's collator renders."""
        if self.images is None:
            raise PairError(
                "there is a column of images, which takes a vision-language model and "
                "axolotl 0.21 or later: remove the column, or have both"
            )
        talk, made = None, {}
        if self.kind in CHAT_TYPES:
            talk = CHAT_TYPES[self.kind](row, self.fields)
        else:
            made = self._read(row)
            if _is_messages(made):
                talk = from_messages(made, WITHOUT_TYPE)
        if talk is not None:
            _require_image_parts(talk)
            made |= {"prompt": talk.context}
            made |= {
                name: [answer]
                for name, answer in zip(ANSWERS, talk.answers, strict=True)
            }
            made |= self._keywords(talk)
        columns, missing = self.images.columns({**row, **made}, talk)
        prompt, *answers = (len(columns[name]) for name in IDS)
        longest = prompt + max(answers)
        self._require_length(longest)
        notes = "\n".join(f"{LEFT_OUT}: {name}" for name in missing)
        return {**made, **columns, NOTES: notes, LENGTHS: [prompt, longest]}

    def _require_length(self, tokens: int) -> None:
        if self.raise_above is not None and tokens > self.raise_above:
            raise PairError(
                f"it has {tokens} tokens, more than `sequence_len: "
                f"{self.raise_above}`: raise it, or set `excess_length_strategy` to "
                "`drop` or `truncate`"
            )

    def _left_to_trl(self, made: dict[str, Any]) -> dict[str, Any]:
        """A row of messages without a type, which TRL renders and divides."""
        talk = from_messages(made, WITHOUT_TYPE)
        prompt = self.template.tokens(talk.context, talk, prompt=True)
        whole = [self.template.tokens(messages, talk) for messages in talk.whole()]
        if any(tokens[: len(prompt)] != prompt for tokens in whole):
            raise PairError(
                "the chat template writes the prompt in another way if an answer "
                f"follows, and TRL would cut the answer: {MESSAGES_TYPE}"
            )
        longest = max(map(len, whole))
        self._require_length(longest)
        lengths = [len(prompt), longest]
        return {**made, **self._keywords(talk), NOTES: "", LENGTHS: lengths}

    def _keywords(self, talk: Conversation) -> dict[str, Any]:
        """The column of variables of the chat template, if there are any, for TRL."""
        keywords = {**self.template.keywords, **talk.keywords}
        return {"chat_template_kwargs": keywords} if keywords else {}

    def _render(self, row: dict[str, Any]) -> tuple[PairText, list[str]]:
        talk = CHAT_TYPES[self.kind](row, self.fields)
        _require_kinds(talk.context, ("text",))
        _require_kinds(talk.answers, ("text",))
        pair = render_pair(self.template, talk)
        notes = [f"{LEFT_OUT}: {name}" for name in left_out(talk, pair)]
        try:
            made = self.transform(dict(row))
            dpo = PairText(*(made[name] for name in TEXTS))
        except Exception as error:  # whatever a type and a template make of it
            return pair, [*notes, f"{TEMPLATE}: it fails with {type(error).__name__}"]
        if pair != dpo:
            notes.append(f"{TEMPLATE}: {_where_texts_differ(pair, dpo)}")
        return pair, notes

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as axolotl's type makes it."""
        if self.kind.rpartition(".")[2] in TWO_MESSAGES:
            _require_two_messages(row)
        if self.kind.endswith(".ultra"):
            _require_question(row)
        seen = _Seen(row)
        try:
            made = dict(self.transform(seen))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise PairError(
                f"it is not as this type takes it ({type(error).__name__}: {error}); "
                f"the columns are {', '.join(row)}: set another `type`, or its "
                "`field_*` keys"
            ) from error
        _require_texts(made, seen.read)
        self._require_values(row, made, seen.read)
        return made

    def _require_values(
        self, row: dict[str, Any], made: Mapping[str, Any], read: Mapping[str, Any]
    ) -> None:
        """Refuses a pair in which an empty value is written as "None"."""
        empty = [key for key, value in read.items() if value is None]
        if not (empty and any("None" in str(made[name]) for name in TEXTS)):
            return
        again = self.transform({**row, **{key: _Nothing(key) for key in empty}})
        for key in empty:
            if any(str(_Nothing(key)) in again[name] for name in TEXTS):
                raise PairError(f"`{key}` is empty: remove the row")

    def _tokenize(self, text: str) -> list[int]:
        return self.template.tokenizer(text)["input_ids"]


class _Seen(dict):
    """A row that records which of its values were read."""

    def __init__(self, row: Mapping[str, Any]):
        super().__init__(row)
        self.read: dict[str, Any] = {}

    def __getitem__(self, key):
        value = super().__getitem__(key)
        self.read.setdefault(key, value)
        return value

    def get(self, key, default=None):
        """The value of a key, whose read is recorded, or a default."""
        return self[key] if key in self else default


class _Nothing:
    """Takes the place of None in a row: it is false, too, and its text is unique.

    If that text is in what a dataset type makes, the type wrote the None as text.
    """

    def __init__(self, key: str):
        self._key = key

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"\0{self._key}\0"


def _require_texts(made: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Refuses a pair with a value that is no text, or that is empty.

    A type may also write a list as Python prints it. Such a text is refused, too.

    Args:
        made: The pair as the type made it.
        read: Name -> value of the columns that the type has read.
    """
    if _is_messages(made):
        return _require_messages(made)
    for name in sorted(TEXTS, key=lambda name: made.get(name) is not None):
        text = made.get(name)
        if not isinstance(text, str):
            found = "absent" if text is None else f"a {type(text).__name__}"
            raise PairError(
                f"`{name}` is {found}, not a text; the columns are "
                f"{', '.join(made)}: {MESSAGES_REMEDY}"
            )
        for key, value in read.items():
            if isinstance(value, list | dict) and value and str(value) in text:
                raise PairError(
                    f"`{key}` is a {type(value).__name__}, and this type would train "
                    f"what Python prints of it: {MESSAGES_REMEDY}"
                )
        if name in ANSWERS and not text.strip():
            raise PairError(f"`{name}` has no text: remove the row")


def _is_messages(made: Mapping[str, Any]) -> bool:
    """Whether a row without a type has messages: TRL renders them."""
    return all(isinstance(made.get(name), list) for name in TEXTS)


def _require_messages(made: Mapping[str, Any]) -> None:
    """Refuses answers that begin with the prompt, which would be there twice."""
    for name in ANSWERS:
        roles = roles_of(made[name])
        if roles != ["assistant"]:
            raise PairError(
                f"`{name}` has messages of {', '.join(roles)}, and after a `prompt` of "
                f"messages one answer is due: {MESSAGES_TYPE}"
            )


def _require_image_parts(talk: Conversation) -> None:
    """Refuses parts and tools that axolotl's collator of images does not handle."""
    _require_kinds(talk.context, ("text", "image"))
    _require_kinds(talk.answers, ("text",))
    if talk.tools:
        raise PairError(
            "it has `tools`, which axolotl leaves out of pairs with images: write them "
            "in a message of the system"
        )


def _require_kinds(messages: Iterable[Message], kinds: tuple[str, ...]) -> None:
    """Refuses parts of messages that would be left out, or trained without pixels."""
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if kind not in kinds:
                raise PairError(
                    f"a message of the {message['role']} has a part of `type: {kind}`: "
                    f"{' and '.join(kinds)} can be trained there"
                    + IMAGE_REMEDY
                    * (kind == "image")
                )


def _require_two_messages(row: Mapping[str, Any]) -> None:
    """Refuses conversations of which a type would take two messages only."""
    for name in ANSWERS:
        messages = row.get(name)
        if not isinstance(messages, list):
            continue  # the type fails with what is there
        roles = roles_of(messages)
        if roles != ["user", "assistant"]:
            raise PairError(
                f"`{name}` has {len(roles)} messages, of {', '.join(roles)}; "
                "this type takes one question and one answer, and would leave out the "
                "rest: set `type: chat_template.argilla_chat`"
            )
        if any(message.get("tool_calls") for message in messages):
            raise PairError(
                f"`{name}` calls a tool, which this type leaves out: set `type: "
                "chat_template.argilla_chat`"
            )
    if all(isinstance(row.get(name), list) for name in ANSWERS):
        questions = [row[name][:1] for name in ANSWERS]
        require_same_context(questions[0], questions[1], ANSWERS)


def _require_question(row: Mapping[str, Any]) -> None:
    """Refuses a prompt that is not the question of the answer beside it."""
    prompt, messages = row.get("prompt"), row.get("chosen")
    if isinstance(prompt, str) and isinstance(messages, list):
        asked = str(messages[0].get("content"))
        if asked.strip() != prompt.strip():
            raise PairError(
                f"`prompt` is {prompt[:40]!r}, and `chosen` answers {asked[:40]!r}, "
                "which this type leaves out: set `type: chat_template.argilla_chat`"
            )


def _where_texts_differ(pair: PairText, dpo: PairText) -> str:
    """Quotes the texts of a pair and of `rl: dpo` where they first differ."""
    ours, theirs = (p.prompt + "|" + p.chosen for p in (pair, dpo))
    if ours == theirs:
        ours, theirs = pair.rejected, dpo.rejected
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    around = slice(max(place - 20, 0), place + 20)
    return f"{theirs[around]!r} instead of {ours[around]!r}"
