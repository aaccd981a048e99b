"""Every chat template that axolotl ships, with conversations of every kind.

What is trained must be what the template writes of the whole conversation, token for
token; what is scored must be the answer. What is refused must be impossible. All is
told from `apply_chat_template`, as in `helpers/templates.py`.
"""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils import chat_templates
from axolotl.utils.chat_templates import get_chat_template
from helpers import matrix, templates, tiny
from helpers.matrix import Cell
from helpers.templates import DEFAULT, WHOLE, Talk, said

from axolotl_edpo.data.conversation import PairError

# What templates may lack.
SYSTEM, TOOLS, CALLS = "system messages", "`tools`", "calls of tools"
RESULTS, THOUGHTS, REASONS = "results of tools", "`<think>`", "`reasoning_content`"


def user(text: str) -> dict:
    return said("user", text)


def answer(text: str, **more: Any) -> dict:
    return said("assistant", text, **more)


def call(town: str) -> dict:
    function = {"name": "weather", "arguments": {"town": town}}
    return {"id": "call12345", "type": "function", "function": function}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "A town."}},
            "required": ["town"],
        },
    },
}
ASKED = [user("How is it there?")]
CALLED = [
    *ASKED,
    answer("", tool_calls=[call("Bonn")]),
    said("tool", "Sunny, 20 degrees", tool_call_id="call12345", name="weather"),
]
BRIEF = [said("system", "Be brief."), user("Cats?")]
EMPTY = [said("system", ""), user("Cats?")]
EARLIER = [user("Dogs?"), answer("<think>\nHm.\n</think>\n\nThey run."), user("Cats?")]
SEVERAL = [
    user("First question"),
    answer("First answer"),
    user("Again"),
    answer("Second answer"),
    user("Again"),
]
SLEEP, OTHER = "They sleep.", "Cats do."
PLAIN = (answer(SLEEP), answer(OTHER))
THINK = (
    answer("<think>\nThey might.\n</think>\n\nThey sleep."),
    answer("<think>\nHm, dogs.\n</think>\n\nCats do."),
)
REASON = (
    answer(SLEEP, reasoning_content="They might."),
    answer(OTHER, reasoning_content="Hm, dogs."),
)
TALKS = {
    "one turn": Talk([user("Cats?")], PLAIN),
    "several turns": Talk(SEVERAL, (answer("Yes."), answer("No, never."))),
    "a system message": Talk(BRIEF, PLAIN),
    "an empty system message": Talk(EMPTY, PLAIN),
    "a tool's result": Talk(CALLED, (answer("Yes."), answer("No.")), [WEATHER]),
    "a call as answer": Talk(
        ASKED,
        (
            answer("", tool_calls=[call("Rome")]),
            answer("", tool_calls=[call("Oslo")]),
        ),
        [WEATHER],
    ),
    "a call against a text": Talk(
        ASKED, (answer("", tool_calls=[call("Rome")]), answer("No.")), [WEATHER]
    ),
    "thoughts": Talk([user("Cats?")], THINK),
    "thoughts in an earlier answer": Talk(EARLIER, PLAIN),
    "thoughts against none": Talk(EARLIER, (THINK[0], PLAIN[1])),
    "`reasoning_content`": Talk([user("Cats?")], REASON),
    "unicode": Talk(
        [user("Grüße 👩‍👩‍👧 مرحبا e\u0301")],
        (answer("\u0301👍🏽 نعم é 你好"), answer("ना \u202eabc")),
    ),
    "blanks and lines": Talk(
        [user("  \n Cats? \n\n")],
        (answer("\n\n  They sleep.  \n"), answer(" Cats do.\t\n\n")),
    ),
    "`a`, `user`": Talk([user("2")], (answer("a"), answer("user"))),
    "`2`, `assistant`": Talk([user("user")], (answer("2"), answer("assistant"))),
    "code": Talk(
        [user("{{ x }} {% if y %}")],
        (answer('{"a": {{ x }}}\n{% endraw %}'), answer("```\nfor (;;) { }\n```")),
    ),
}
# What a template cannot write -> the conversations that are then refused.
NEEDS = {
    CALLS: ("a call as answer", "a call against a text"),
    THOUGHTS: ("thoughts", "thoughts against none"),
    REASONS: ("`reasoning_content`",),
    SYSTEM: ("a system message", "an empty system message"),
    RESULTS: ("a tool's result",),
}
# What a note names -> what the template lacks.
LEFT_OUT = {
    "a message of the system": SYSTEM,
    "`tools`": TOOLS,
    "a message of the assistant": CALLS,
    "a message of the tool": RESULTS,
}
TITLE = "Chat templates"
INTRO = f"""
All that axolotl ships, with {len(TALKS)} conversations of each type `chat_template`:
one turn and several, a system message, an empty one, a tool's result, a call as answer,
thoughts in `<think>` and in `reasoning_content`, unicode, blanks around texts, answers
that are words of the template, code. "Equal" means: what is trained are the tokens that
`apply_chat_template` gives for the whole conversation, up to white space at its end and
an `eos_token`; what is scored begins with the answer. A row with what is refused stops
`preprocess` with a message; what is left out of a context is told in a warning.
"""


@dataclass(frozen=True)
class Template(Cell):
    """A cell of a template that axolotl ships.

    Attributes:
        shipped: Its name.
        drops: What it would leave out of an answer.
        raises: What it refuses to write.
        leaves: What it leaves out of a context.
    """

    shipped: str = ""
    drops: Collection[str] = ()
    raises: Collection[str] = ()
    leaves: Collection[str] = ()

    @property
    def verdict(self) -> str:
        return self.missing or "equal"

    @property
    def refusals(self) -> dict[str, str]:
        """Names of conversations -> `drops` or `raises`."""
        return {
            talk: reason
            for reason in ("drops", "raises")
            for need in getattr(self, reason)
            for talk in NEEDS[need]
        }


def template(
    name: str,
    drops: Collection[str] = (),
    raises: Collection[str] = (),
    leaves: Collection[str] = (),
) -> Template:
    told = {
        "refused, as it has no place for them: ": drops,
        "refused, as it raises an error: ": raises,
        "left out of contexts: ": leaves,
    }
    return Template(
        f"`{name}`",
        note="; ".join(start + ", ".join(what) for start, what in told.items() if what),
        missing=matrix.without(name, shipped()),
        shipped=name,
        drops=drops,
        raises=raises,
        leaves=leaves,
    )


def shipped() -> list[str]:
    """Names of the templates of the installed axolotl."""
    folder = Path(chat_templates.__file__).parent / "templates"
    return sorted(file.stem for file in folder.glob("*.jinja"))


# Each refuses, leaves out or rewrites something else.
REPRESENTATIVE = (
    "alpaca",
    "chatml",
    "deepseek_v3",
    "gemma",
    "gemma4",
    "llama4",
    "mistral_v2v3",
    "pixtral",
    "qwen3",
)
# Templates of text alone.
PLAIN_TEXT = (CALLS, REASONS)
UNHEARD = (TOOLS, CALLS, RESULTS)
CELLS = [
    template("alpaca", PLAIN_TEXT, leaves=UNHEARD),
    template("aya", PLAIN_TEXT, raises=[RESULTS]),
    template("chatml", PLAIN_TEXT, leaves=[TOOLS, CALLS]),
    template("cohere", PLAIN_TEXT, raises=[RESULTS]),
    template("command_a", PLAIN_TEXT, leaves=UNHEARD),
    template("command_a_rag", [REASONS]),
    template("command_a_tool_use", [REASONS]),
    template("deepseek_v2", PLAIN_TEXT, leaves=UNHEARD),
    template("deepseek_v3", [REASONS, THOUGHTS], raises=[CALLS, RESULTS]),
    template("exaone", PLAIN_TEXT, leaves=[TOOLS, CALLS]),
    template("exaone4", [REASONS, THOUGHTS]),
    template("falcon_h1", PLAIN_TEXT, leaves=[CALLS]),
    template("gemma", PLAIN_TEXT, raises=[SYSTEM, RESULTS]),
    template("gemma3", PLAIN_TEXT, raises=[RESULTS]),
    template("gemma3n", PLAIN_TEXT, raises=[RESULTS]),
    template("gemma4", [REASONS]),
    template("gemma4_unified", [REASONS]),
    template("jamba", [REASONS]),
    template("llama3", PLAIN_TEXT, leaves=[TOOLS, CALLS]),
    template("llama3_2_vision", [REASONS]),
    template("llama4", [REASONS]),
    template("llava", PLAIN_TEXT, leaves=[TOOLS, CALLS]),
    template("metharme", PLAIN_TEXT, leaves=UNHEARD),
    template("mistral_v1", PLAIN_TEXT, raises=[RESULTS]),
    template("mistral_v2v3", [REASONS], leaves=[SYSTEM]),
    template("mistral_v3_tekken", [REASONS], leaves=[SYSTEM]),
    template("mistral_v7_tekken", PLAIN_TEXT, raises=[RESULTS]),
    template("nemotron_h", PLAIN_TEXT, raises=[RESULTS]),
    template("phi_3", PLAIN_TEXT, leaves=UNHEARD),
    template("phi_35", PLAIN_TEXT, leaves=UNHEARD),
    template("phi_4", PLAIN_TEXT, leaves=UNHEARD),
    template("pixtral", PLAIN_TEXT, raises=[RESULTS], leaves=[SYSTEM]),
    template("qwen2_vl", PLAIN_TEXT, leaves=[TOOLS, CALLS]),
    template("qwen3"),
    template("qwen3_5"),
    template("qwen_25", [REASONS]),
]
TOKENIZERS = {"bytes": tiny.byte_tokenizer, "merges": templates.merging_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def refused(tokenizer, source: str, talk: Talk, message: str) -> str:
    """Why a pair is refused, by what the template does: raises, or drops."""
    texts = []
    for said_last in talk.answers:
        try:
            texts.append(
                templates.written(tokenizer, source, talk.whole(said_last), talk.tools)
            )
        except Exception as error:
            assert str(error) in message
            return "raises"
    for text, said_last in zip(texts, talk.answers, strict=True):
        if any(part not in text for part in words(said_last)):
            assert "the chat template leaves out a part of `" in message
            return "drops"
    raise AssertionError(f"{message}; but the template writes {texts}")


def words(message: dict) -> Iterator[str]:
    """What of an answer must be in a conversation, and in no context of TALKS."""
    thoughts, _, rest = message["content"].rpartition("</think>")
    yield from filter(None, [rest.strip(), thoughts.removeprefix("<think>").strip()])
    yield message.get("reasoning_content", "")
    for made in message.get("tool_calls", ()):
        yield made["function"]["arguments"]["town"]


@pytest.mark.parametrize("kind", [DEFAULT, WHOLE])
@matrix.cells(CELLS, lambda cell: cell.shipped in REPRESENTATIVE)
def test_what_is_trained_is_what_the_template_writes(cell, kind, tokenizer):
    source = get_chat_template(cell.shipped)
    make = templates.maker(kind, tokenizer, source)
    refusals, left_out = {}, set()
    for name, talk in TALKS.items():
        try:
            pair = make(copy.deepcopy(talk.row(kind)))
        except PairError as error:
            refusals[name] = refused(tokenizer, source, talk, str(error))
            continue
        scored = templates.scored(tokenizer, source, talk, pair)
        for text, last in zip(scored, talk.answers, strict=True):
            assert all(word in text for word in words(last))
        left_out |= {LEFT_OUT[detail] for detail in templates.notes(pair, "left out")}
    assert refusals == cell.refusals
    assert left_out == {*cell.leaves}


def test_every_template_that_axolotl_ships_has_a_cell():
    assert {*shipped()} <= {cell.shipped for cell in CELLS}


def test_tokens_are_merged_across_the_start_of_answers():
    tokenizer = templates.merging_tokenizer()
    make = templates.maker(DEFAULT, tokenizer, get_chat_template("phi_3"))
    pairs = [make(TALKS[name].row(DEFAULT)) for name in ("one turn", "code")]
    assert {templates.moved(pair) for pair in pairs} == {"", "|>\n"}
