"""Pairs as a chat template writes them, and what TRL would train of them.

Nothing here uses `axolotl_edpo.data.rendering`: what a pair should be is read from
`apply_chat_template` alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from axolotl.utils.data.rl import load_dpo
from axolotl.utils.dict import DictDefault
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
