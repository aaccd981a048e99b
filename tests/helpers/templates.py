"""Pairs as a chat template writes them, and what TRL would train of them.

Nothing here uses `axolotl_edpo.data.rendering`: what a pair should be is read from
`apply_chat_template` alone.
"""

import ast
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from axolotl.utils.data.rl import load_dpo
from axolotl.utils.dict import DictDefault
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from axolotl_edpo.data.pair_maker import PairMaker
from axolotl_edpo.data.preparation import Preparation
from helpers import tiny

DEFAULT, WHOLE = "chat_template.default", "chat_template.argilla_chat"
Message = dict[str, Any]


def said(role: str, content: str, **more: Any) -> Message:
    """A message."""
    return {"role": role, "content": content, **more}


@dataclass(frozen=True)
class Talk:
    """Two answers to a context.

    Attributes:
        context: The messages before the answer.
        answers: The message chosen and the message rejected.
        tools: Functions that the model may call.
    """

    context: Sequence[Message]
    answers: tuple[Message, Message]
    tools: Sequence[Any] = ()

    def row(self, kind: str) -> dict[str, Any]:
        """A row of data of a type."""
        chosen, rejected = self.answers
        tools = {"tools": [*self.tools]} if self.tools else {}
        if kind == DEFAULT:
            texts = dict(messages=[*self.context], chosen=chosen, rejected=rejected)
        else:
            texts = dict(chosen=self.whole(chosen), rejected=self.whole(rejected))
        return {**texts, **tools}

    def whole(self, *answer: Message) -> list[Message]:
        """The context with an answer, or without."""
        return [*self.context, *answer]


def maker(kind: str, tokenizer: Any, template: str, **recipe: Any) -> PairMaker:
    """What makes the pairs of a recipe, with axolotl's own transform.

    Args:
        kind: `type` of the data set's entry.
        tokenizer: A tokenizer.
        template: A chat template.
        **recipe: Further keys.
    """
    entry = {"path": "rows.jsonl", "type": kind}
    chat = {"chat_template": "jinja", "chat_template_jinja": template}
    cfg = DictDefault({**chat, "datasets": [entry], "sequence_len": 4096, **recipe})
    made = Preparation(cfg, tokenizer).load_type(load_dpo, kind, cfg, 0)
    assert made is not None
    return made[0]


def written(
    tokenizer: Any,
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    prompt: bool = False,
) -> str:
    """What a template writes."""
    return tokenizer.apply_chat_template(
        messages,
        tools=[*tools] or None,
        chat_template=template,
        add_generation_prompt=prompt,
        tokenize=False,
    )


def trained(tokenizer: Any, pair: Mapping[str, Any], name: str) -> tuple[list, list]:
    """Tokens of the prompt and of an answer, as TRL makes them of texts."""
    prompt, answer, end = pair["prompt"], pair[name], tokenizer.eos_token
    whole = prompt + answer + ("" if answer.endswith(end) else end)
    prompt_ids, ids = (tokenizer(text)["input_ids"] for text in (prompt, whole))
    return prompt_ids, ids[len(prompt_ids) :]


def scored(tokenizer: Any, template: str, talk: Talk, pair: dict) -> list[str]:
    """Asserts that a pair is what a template writes, divided where answers begin.

    Its tokens are those of both conversations, up to white space at their end and an
    end of text. Scored is what follows the prompt of generation, if both conversations
    begin with it; if not, what follows the last message or a part of the marks after
    it. What the tokenizer merges with an answer is scored, too.

    Returns:
        The text of each answer's scored tokens.
    """
    write = partial(written, tokenizer, template, tools=talk.tools)
    texts = [write(talk.whole(answer)) for answer in talk.answers]
    opened = write(talk.whole(), prompt=True)
    begin = all(text.startswith(opened) for text in texts)
    low, high = (len(opened),) * 2 if begin else _marks(write, talk)
    found = []
    for name, text in zip(("chosen", "rejected"), texts, strict=True):
        prompt, answer = trained(tokenizer, pair, name)
        assert prompt + answer in _tokens(tokenizer, text)
        begins = pair["prompt"] + moved(pair)
        if repeats_start(tokenizer) and text.startswith(tokenizer.bos_token):
            begins = tokenizer.bos_token + begins
        assert text.startswith(begins)
        assert low <= len(begins) <= high
        found.append(tokenizer.decode(answer))
        assert found[-1].startswith(moved(pair))
    return found


def _marks(write: Callable, talk: Talk) -> tuple[int, int]:
    """Where what is between the last message and a plain answer begins and ends."""
    probe, (*before, last) = said("assistant", "(answer)"), talk.context
    end = write([*talk.context, probe]).index("(answer)")
    other = write([*before, {**last, "content": "(last)"}, probe])
    _, is_written, after = other.partition("(last)")
    return (end - after.index("(answer)") if is_written else 0), end


def _tokens(tokenizer: Any, text: str) -> list[list[int]]:
    """Tokens of a conversation up to white space, and those with an end of text."""
    text = text.rstrip()
    begins = repeats_start(tokenizer) and not text.startswith(tokenizer.bos_token)
    start = [tokenizer.bos_token_id] if begins else []
    ended = (text, text + tokenizer.eos_token)
    return [start + tokenizer(t, add_special_tokens=False)["input_ids"] for t in ended]


def repeats_start(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with its bos token."""
    return tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def notes(pair: Mapping[str, Any], kind: str) -> list[str]:
    """Details of the notes of a kind."""
    lines = [note.partition(": ") for note in pair["edpo_notes"].split("\n")]
    return [detail for found, _, detail in lines if found == kind]


def moved(pair: Mapping[str, Any]) -> str:
    """What of a prompt is scored, as the tokenizer merges it with the answer."""
    return "".join(map(ast.literal_eval, notes(pair, "merged")))


def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that begins every text with <s>."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@cache
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that merges across everything: words, blanks, lines, messages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*tiny.REFERENCE_SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LEARNED, learn)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tiny.SPECIAL)


# What its merges are learned of: roles and marks of templates beside starts of answers.
STARTS = ("It is", "They sleep", "Yes", "No", "Cats", "a", "user", "2", " ", "\n")
MARKS = ("assistant", "model", "user", "[/INST]", "Assistant:", "<think>", ">", "|>")
LEARNED = [
    mark + between + start + ".\n"
    for mark in MARKS
    for between in ("", " ", "\n", "\n\n", ">\n")
    for start in STARTS
]
