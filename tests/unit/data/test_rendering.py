"""How a conversation is divided into prompt and answers, by templates of every kind."""

import pytest
from helpers import tiny

from axolotl_edpo.data.conversation import Conversation, PairError
from axolotl_edpo.data.rendering import ChatTemplate, left_out, render_pair

TOKENIZER = tiny.byte_tokenizer()
EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
DUE = "{% if add_generation_prompt %}<assistant>{% endif %}"


def template(source: str, **keywords) -> ChatTemplate:
    return ChatTemplate(TOKENIZER, source, keywords)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def talk(*context: dict, chosen="Yes.", rejected="No.", **more) -> Conversation:
    """A conversation whose answers are texts or messages."""
    answers = [a if isinstance(a, dict) else answer(a) for a in (chosen, rejected)]
    more = {"tools": None, "keywords": {}, **more}
    return Conversation([*context], (answers[0], answers[1]), **more)


def texts(source: str, asked: Conversation, **keywords) -> tuple[str, str, str]:
    pair = render_pair(template(source, **keywords), asked)
    return pair.prompt, *pair.answers


CATS = talk(user("Cats?"))
THOUGHTS = talk(
    user("Cats?"), chosen="<think>\nHm.\n</think>\n\nYes.", rejected="No.\n"
)
# The last answer always has thoughts, and those of earlier ones are left out.
THINKS = """\
{%- for m in messages %}{% set text = m.content %}
{%- if m.role == 'assistant' and loop.last and '<think>' not in text %}
{%- set text = '<think>\n\n</think>\n\n' + text %}{% endif %}
{%- if not loop.last and '</think>' in text %}
{%- set text = text.split('</think>\n\n')[-1] %}{% endif %}
{{- '<' + m.role + '>' + text + '</s>' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"""


@pytest.mark.parametrize(
    ("source", "pair"),
    [
        (EACH + DUE, ("<user>Cats?</s><assistant>", "Yes.</s>", "No.</s>")),
        (EACH, ("<user>Cats?</s>", "<assistant>Yes.</s>", "<assistant>No.</s>")),
        (
            EACH + "{% if add_generation_prompt %}<assistant> {% endif %}",
            ("<user>Cats?</s><assistant>", "Yes.</s>", "No.</s>"),
        ),
        (
            "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}",
            ("<s>Cats?\n", "Yes.", "No."),
        ),
        (
            THINKS,
            (
                "<user>Cats?</s><assistant><think>\n",
                "\n</think>\n\nYes.</s>",
                "\n</think>\n\nNo.</s>",
            ),
        ),
    ],
    ids=["marks", "no start", "another start", "white space", "thoughts that open"],
)
def test_one_question(source, pair):
    assert texts(source, CATS) == pair


def test_words_that_both_answers_begin_with_are_scored():
    alike = talk(user("Cats?"), chosen="Yes, they do.", rejected="Yes, all.")
    other = EACH + "{% if add_generation_prompt %}<assistant> {% endif %}"
    for source in (EACH + DUE, other):
        assert texts(source, alike) == (
            "<user>Cats?</s><assistant>",
            "Yes, they do.</s>",
            "Yes, all.</s>",
        )


def test_answers_with_thoughts_and_without():
    opened = "<user>Cats?</s><assistant><think>\n"
    written = ("Hm.\n</think>\n\nYes.</s>", "\n</think>\n\nNo.\n</s>")
    assert texts(THINKS, THOUGHTS) == (opened, *written)
    closed = THINKS.replace("'<assistant><think>\n'", "'<assistant><think>\n\n</th'")
    assert texts(closed, THOUGHTS) == (opened, *written)
    plain = ("<think>\nHm.\n</think>\n\nYes.</s>", "No.\n</s>")
    assert texts(EACH + DUE, THOUGHTS) == ("<user>Cats?</s><assistant>", *plain)


def test_thoughts_of_earlier_answers_are_left_out_as_the_template_does():
    asked = talk(user("Dogs?"), answer("<think>\nHm.\n</think>\n\nYes."), user("Cats?"))
    prompt, *_ = texts(THINKS, asked)
    assert prompt == (
        "<user>Dogs?</s><assistant>Yes.</s><user>Cats?</s><assistant><think>\n"
    )
    assert [*left_out(asked, render_pair(template(THINKS), asked))] == []


def test_a_system_message_that_only_prompts_have():
    """Mistral's templates write it before a question that comes last."""
    brief = "{% if loop.last and m.role == 'user' %}Be brief.{% endif %}"
    source = EACH.replace("<{{", brief + "<{{")
    assert texts(source + DUE, CATS) == (
        "<user>Cats?</s><assistant>",
        "Yes.</s>",
        "No.</s>",
    )


def test_answers_without_a_context_are_scored_after_what_is_before_any_answer():
    source = "{{ bos_token }}<system>Be good.</s>" + EACH + DUE
    assert texts(source, talk()) == (
        "<s><system>Be good.</s><assistant>",
        "Yes.</s>",
        "No.</s>",
    )


def test_answers_that_call_a_tool_and_that_do_not():
    source = EACH.replace(
        "</s>", "{% for c in m.tool_calls or () %}[{{ c | tojson }}]{% endfor %}</s>"
    )
    call = {"name": "now", "arguments": {"zone": "A"}}
    asked = talk(user("Time?"), chosen=answer("", tool_calls=[call]))
    written = '[{"name": "now", "arguments": {"zone": "A"}}]</s>'
    assert texts(source + DUE, asked) == (
        "<user>Time?</s><assistant>",
        written,
        "No.</s>",
    )


def test_the_row_sets_variables_of_the_template_before_the_recipe_does():
    source = "{{ style }}" + EACH + DUE
    assert texts(source, CATS, style="Brief.")[0].startswith("Brief.<user>")
    long = talk(user("Cats?"), keywords={"style": "Long."})
    assert texts(source, long, style="Brief.")[0].startswith("Long.<user>")


# --- what is refused ------------------------------------------------------------------


def refusal(source: str, asked: Conversation) -> str:
    with pytest.raises(PairError) as error:
        render_pair(template(source), asked)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('No users.') }}", "No users."),
        (
            "{{ messages[0].content + 1 }}",
            'can only concatenate str (not "int") to str',
        ),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{% for %}", "Expected an expression"),
    ],
    ids=["raises", "type", "attribute", "syntax"],
)
def test_what_a_template_does_not_take(source, reason):
    said = refusal(source, CATS)
    assert said.startswith("the chat template refuses messages of user, assistant: ")
    assert reason in said
    assert said.endswith("change the row, or set another `chat_template`")


THOUGHTLESS = EACH.replace("m.content", "m.content.split('</think>')[-1]")
CALL = {"function": {"name": "now", "arguments": {}}}
LOST = {
    "the answer": (EACH.replace("m.content", "m.content[:2]"), CATS, "chosen", "Yes."),
    "its thoughts": (THOUGHTLESS, THOUGHTS, "chosen", "Hm."),
    "thoughts beside it": (
        EACH,
        talk(user("Cats?"), rejected=answer("No.", reasoning_content="Hm.")),
        "rejected",
        "Hm.",
    ),
    "a call": (EACH, talk(rejected=answer("", tool_calls=[CALL])), "rejected", "now"),
    "thoughts that are the answer": (
        THOUGHTLESS,
        talk(user("2 + 2?"), chosen="<think>4</think>4"),
        "chosen",
        "4",
    ),
    "thoughts that are in the answer": (
        THOUGHTLESS,
        talk(user("2 + 2?"), chosen="<think>4</think>It is 4."),
        "chosen",
        "4",
    ),
    "a part of a list": (
        EACH.replace("m.content", "m.content[0].text or m.content"),
        talk(chosen=answer([{"type": "text", "text": t} for t in ("A", "B")])),
        "chosen",
        "B",
    ),
}


@pytest.mark.parametrize(("source", "asked", "name", "part"), LOST.values(), ids=LOST)
def test_what_a_template_leaves_out_of_an_answer(source, asked, name, part):
    assert refusal(source + DUE, asked) == (
        f"the chat template leaves out a part of `{name}`: {part!r}: set another "
        "`chat_template` that writes it, or remove the row"
    )


def test_thoughts_under_two_keys_are_looked_for_once():
    told = answer("Yes.", reasoning_content="Hm.", reasoning="Hm.")
    source = EACH.replace("{{ m.content", "{{ m.reasoning_content or '' }}{{ m.content")
    assert texts(source + DUE, talk(chosen=told))[1] == "Hm.Yes.</s>"


def test_an_answer_may_be_written_as_json():
    source = EACH.replace("m.content", "m.content | tojson")
    assert texts(source + DUE, talk(user("?"), chosen='"é"\n'))[1] == '"\\"é\\"\\n"</s>'


# Thoughts of earlier answers are kept if the last message has a call, as gpt-oss does.
KEEPS = EACH.replace(
    "{{ m.content",
    "{% if m.thinking and messages[-1].tool_calls %}{{ m.thinking }}{% endif %}"
    "{{ m.content",
).replace("</s>", "{% if m.tool_calls %}now{% endif %}</s>")


@pytest.mark.parametrize("last", ["1", "Sunny."])
def test_a_context_that_depends_on_the_answers_is_refused(last):
    """Also one whose last words are somewhere before: "1" is."""
    asked = talk(
        user("Answer 1 or 2."),
        answer("Well", thinking="Hm."),
        user(last),
        chosen=answer("", tool_calls=[CALL]),
    )
    assert refusal(KEEPS + DUE, asked) == (
        "the chat template writes earlier messages in another way if other answers "
        "follow, so the two conversations have no common prompt: set another "
        "`chat_template`"
    )


# --- what is left out of a context ----------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (EACH, ["a message of the assistant", "`tools`"]),
        ("{{ tools | tojson }}" + EACH, ["a message of the assistant"]),
        (
            "{{ tools | tojson }}" + EACH + "{{ messages[1].tool_calls | tojson }}",
            [],
        ),
        (
            EACH.replace("messages", "messages[1:]"),
            ["a message of the user", "a message of the assistant", "`tools`"],
        ),
    ],
    ids=["calls and tools", "calls", "nothing", "a question"],
)
def test_what_of_a_context_is_left_out(source, names):
    call = {"function": {"name": "now", "arguments": {"zone": "Rome"}}}
    asked = talk(
        user("Time?"),
        answer("", tool_calls=[call]),
        {"role": "tool", "content": "Noon."},
        tools=[{"type": "function", "function": {"name": "now"}}],
    )
    found = [*left_out(asked, render_pair(template(source), asked))]
    assert found == names
