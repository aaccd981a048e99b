"""Random conversations, chat templates, tokenizers and lengths.

Of every pair the answers are scored, after what the template writes before them; or the
row is refused, for what is the case. Templates come from a small grammar, whose parts
are those of real ones.
"""

from typing import Any

from helpers import templates, tiny
from helpers.templates import DEFAULT, WHOLE, Talk, said
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.data.completions import completions_of
from axolotl_edpo.data.conversation import ANSWERS, PairError

RANDOM = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
PLAIN = (tiny.byte_tokenizer(), templates.merging_tokenizer())
TOKENIZERS = st.sampled_from([*PLAIN, *map(templates.beginning, PLAIN)])

# --- templates -----------------------------------------------------------------------

BEFORE = ("<|im_start|>%\n", "[%]", "%: ", "<%>", "", "\n### %:\n")
AFTER = ("<|im_end|>\n", "</s>", "\n\n", "", "\n")
OPENED = ("", "<think>\n", "<think>\n\n</think>\n\n", " ")
REFUSED = "{% if system %}{{ raise_exception('No system message.') }}{% endif %}"
MERGED = "{% if loop.first and system %}{% set text = system ~ ' ' ~ text %}{% endif %}"
FORGETS = (
    "{% if not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
# Forgets them only before an answer without thoughts.
FORGETS_SOME = FORGETS.replace("if not", "if '<think>' not in rest[-1].content and not")
THINKS = (
    "{% if loop.last and m.role == 'assistant' and '<think>' not in text %}"
    "{% set text = '<think>\\n\\n</think>\\n\\n' ~ text %}{% endif %}"
)


@st.composite
def chat_templates(draw) -> str:
    """A template: what begins it, what becomes of messages, where an answer is due."""
    before, after = draw(st.sampled_from(BEFORE)), draw(st.sampled_from(AFTER))
    system = draw(st.sampled_from([REFUSED, MERGED, "written"]))
    rewritten = [
        "{% set text = m.content | trim %}"
        if draw(st.booleans())
        else "{% set text = m.content %}",
        MERGED if system is MERGED else "",
        draw(st.sampled_from(["", "", FORGETS, FORGETS_SOME])),
        draw(st.sampled_from(["", "", THINKS])),
    ]
    begins = [draw(st.sampled_from(["", "{{ bos_token }}"])), SPLIT]
    if system is REFUSED:
        begins.append(REFUSED)
    elif system is not MERGED:
        text = message(before, "'system'", "system", after)
        begins.append("{% if system %}" + text + "{% endif %}")
    due = message(before, "'assistant'", repr(draw(st.sampled_from(OPENED))), "")
    if not draw(st.booleans()):
        due = ""
    every = "{% for m in rest %}" + "".join(rewritten)
    every += message(before, "m.role", "text", after) + "{% endfor %}"
    return (
        "".join(begins) + every + "{% if add_generation_prompt %}" + due + "{% endif %}"
    )


SPLIT = (
    "{% set is_told = messages[0].role == 'system' %}"
    "{% set system = messages[0].content if is_told else '' %}"
    "{% set rest = messages[1:] if is_told else messages %}"
)


def message(before: str, role: str, text: str, after: str) -> str:
    """An expression of jinja, of expressions."""
    written = f"{before!r}.replace('%', {role}) ~ {text} ~ {after!r}"
    return "{{ " + written + " }}"


# --- conversations -------------------------------------------------------------------

PIECES = (
    *("It is.", "They sleep", "a", "2", "No", " ", "  ", "\n", "\n\n", "\t", "user"),
    *("[assistant]", "<|im_end|>", "### user:\n", "</s>", "{{ x }}", "{% endfor %}"),
    *("é", "e\u0301", "\u0301", "👩‍👧", "مرحبا", "你好", "\u202e"),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
THOUGHTS = st.sampled_from(["", "", "<think>\nHm.\n</think>\n\n", "<think></think>"])
ANSWERED = st.builds(str.__add__, THOUGHTS, TEXTS.filter(str.strip))


@st.composite
def talks(draw) -> Talk:
    """Up to two turns before the question, and its answers."""
    context = [said("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        context += [said("user", draw(TEXTS)), said("assistant", draw(ANSWERED))]
    context.append(said("user", draw(TEXTS)))
    chosen, rejected = (said("assistant", draw(ANSWERED)) for _ in ANSWERS)
    return Talk(context, (chosen, rejected))


# --- what must hold ------------------------------------------------------------------


def assert_true(reason: str, template: str, talk: Talk) -> None:
    """A row is refused for what is the case."""
    if "No system message." in reason:
        assert REFUSED in template and talk.context[0]["role"] == "system"
    else:
        assert "writes earlier messages in another way" in reason
        earlier = "".join(message["content"] for message in talk.context)
        last = "".join(message["content"] for message in talk.answers)
        assert FORGETS_SOME in template and "<think>" in earlier and "<think>" in last


def assert_truncated(tokenizer: Any, pair: dict, length: int) -> None:
    """What a collator scores is the start of the answers that has room."""
    both = [templates.trained(tokenizer, pair, name) for name in ANSWERS]
    prompt = both[0][0]
    ids = {"prompt_ids": prompt, "chosen_ids": both[0][1], "rejected_ids": both[1][1]}
    batch = PairCollator(pad_token_id=2, max_length=length).torch_call([ids])
    _, targets, lengths = completions_of(batch)
    for (_, answer), found in zip(both, targets.split(lengths.tolist()), strict=True):
        first = 0 if prompt else 1  # nothing predicts a first token
        assert found.tolist() == answer[first : max(length - len(prompt), first)]


@RANDOM
@given(
    talk=talks(),
    template=chat_templates(),
    tokenizer=TOKENIZERS,
    kind=st.sampled_from([DEFAULT, WHOLE]),
    length=st.integers(1, 120),
)
def test_answers_are_scored_after_what_the_template_writes(
    talk, template, tokenizer, kind, length
):
    try:
        pair = templates.maker(kind, tokenizer, template)(talk.row(kind))
    except PairError as refusal:
        assert_true(str(refusal), template, talk)
        return
    scored = templates.scored(tokenizer, template, talk, pair)
    for text, answer in zip(scored, talk.answers, strict=True):
        thoughts, _, said_last = answer["content"].rpartition("</think>")
        assert said_last.strip() in text
        assert thoughts.removeprefix("<think>").strip() in text
    assert_truncated(tokenizer, pair, length)
