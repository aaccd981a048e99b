"""Faults in data that people report: right, or refused with the true reason.

Each is loaded as by `axolotl preprocess`, `train` and `evaluate`.
"""

import json
from pathlib import Path

import pytest
from datasets import disable_caching, enable_caching
from helpers import tiny
from helpers.commands import forked

QUESTION = {"role": "user", "content": "0 plus 0?"}


def said(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


def asked(chosen: str, rejected: str, **keys) -> dict:
    """A row of `chat_template.default`."""
    return {
        "messages": [QUESTION],
        "chosen": said(chosen),
        "rejected": said(rejected),
        **keys,
    }


THOUGHT = "<think>{0}adding.{0}</think>{1}0, good."
CALL = {"function": {"name": "count", "arguments": '{"shelf": 0}'}, "type": "function"}
OPENS_THOUGHTS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ '\\n' if m.role == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{{ '<think>' if thinks is not defined else '' }}{% endif %}"
)
FORMAT = {"prompt_format": "Q: {prompt}\nA: ", "chosen_format": "{chosen}"}


@pytest.fixture
def load(tmp_path, recipe, monkeypatch):
    """Loads rows as entries of a type; returns the prepared rows."""
    monkeypatch.chdir(tmp_path)
    disable_caching()

    def make(rows: list[dict], kind="chat_template.default", **keys) -> list[dict]:
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"path": "a.jsonl", "split": "train", **keys.pop("entry", {})}
        if kind:
            entry["type"] = kind
        keys = {"dataset_prepared_path": "prepared", "datasets": [entry], **keys}
        keys = {"shuffle_merged_datasets": False, "sequence_len": 1024, **keys}
        data = tiny.load_data(tiny.load_config(tmp_path, recipe(**keys)))
        return data.train_dataset.to_list()

    yield make
    enable_caching()


def merging(folder: Path) -> str:
    """Saves a tokenizer that merges a blank with the letter after it."""
    tokenizer = tiny.byte_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"]["Ġb"] = len(backend["model"]["vocab"])
    backend["model"]["merges"] = [["Ġ", "b"]]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    return str(folder)


@pytest.mark.parametrize(
    ("answer", "keys", "start", "scored"),
    [
        (
            THOUGHT.format("\n", "\n\n"),
            {},
            "<think>\n",
            "adding.\n</think>\n\n0, good.",
        ),
        (THOUGHT.format("", ""), {}, "<think>\n", "adding.\n</think>\n\n0, good."),
        (
            "0, good.",
            {"chat_template_kwargs": {"enable_thinking": False}},
            "<think>\n\n</think>\n\n",
            "0, good.",
        ),
    ],
    ids=["canonical", "tight", "enable_thinking: false"],
)
def test_thoughts_are_as_the_template_writes_them(load, answer, keys, start, scored):
    (row,) = load([asked(answer, "no.")], chat_template="qwen3", **keys)
    whole = row["prompt"] + row["chosen"]
    assert whole.count("<think>") == whole.count("</think>") == 1
    assert whole.endswith(f"<|im_start|>assistant\n{start}{scored}<|im_end|>")
    assert scored.removeprefix("\n") in row["chosen"]


def test_the_blank_before_an_answer_stays(load):
    (row,) = load([asked("good", "no")], chat_template="mistral_v2v3")
    assert row["prompt"].endswith("[INST] 0 plus 0?[/INST]")
    assert (row["chosen"], row["rejected"]) == (" good</s>", " no</s>")


def test_answers_that_the_template_holds_are_trained(load, caplog):
    rows = load([asked("a", "2"), asked("user", "<")], chat_template="llama3")
    assert [row["chosen"] for row in rows] == ["a<|eot_id|>", "user<|eot_id|>"]
    assert [row["rejected"] for row in rows] == ["2<|eot_id|>", "<<|eot_id|>"]


def test_a_blank_that_merges_with_an_answer_is_scored_with_it(load, tmp_path, caplog):
    rows = [{"prompt": "a", "chosen": "be", "rejected": "bo"}] * 2
    rows.append({"prompt": "a", "chosen": "c", "rejected": "d"})
    keys = {"tokenizer_config": merging(tmp_path / "merging")}
    found = load(rows, {**FORMAT, "rejected_format": "{rejected}"}, **keys)
    assert found[0] == {"prompt": "Q: a\nA:", "chosen": " be", "rejected": " bo"}
    assert found[2] == {"prompt": "Q: a\nA: ", "chosen": "c", "rejected": "d"}
    assert "2 of 3 pairs have a prompt whose last characters" in caplog.text


def test_calls_of_tools_are_in_the_prompt_and_in_answers(load):
    messages = [QUESTION, said("", tool_calls=[CALL])]
    messages.append({"role": "tool", "content": "3 books"})
    tools = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
    row = asked("three.", "", messages=messages, tools=json.dumps(tools))
    row["rejected"] = said("", tool_calls=[CALL])
    (found,) = load([row], chat_template="qwen3")
    call = '<tool_call>\n{"name": "count", "arguments": {"shelf": 0}}\n</tool_call>'
    assert found["prompt"].count(call) == found["rejected"].count(call) == 1
    assert '"name": "count", "parameters"' in found["prompt"]
    assert "3 books" in found["prompt"] and found["chosen"].endswith("three.<|im_end|>")


def test_a_call_that_the_template_leaves_out_is_refused(load):
    row = {**asked("", "no"), "chosen": said("", tool_calls=[CALL])}
    with pytest.raises(
        ValueError, match="row 1 .*leaves out a part of `chosen`: 'count"
    ):
        load([row], chat_template="chatml")


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("drop_system_message", True, "remove system messages"),
        ("field_tools", "functions", "name the column `tools`"),
        ("train_on_eos", "all", "remove it"),
        ("name", "b", "save that part"),
        ("ds_type", "csv", "give the file the extension"),
        ("feild_chosen", "b", "remove it"),
    ],
)
def test_options_without_effect_are_refused(load, option, value, remedy):
    with pytest.raises(ValueError, match=f"`datasets: {option}: .*ignored, {remedy}"):
        load([asked("a", "b")], entry={option: value})


@pytest.mark.parametrize("kind", ["llama3.argilla_chat", "chatml.ultra"])
def test_whole_conversations_are_refused_by_types_for_two_messages(load, kind):
    talk = [QUESTION, said("0"), QUESTION]
    row = {"prompt": "0 plus 0?", "chosen": [*talk, said("0")]}
    row["rejected"] = [*talk, said("1")]
    with pytest.raises(ValueError, match=r"row 2 of `a.jsonl` .*has 4 messages, of"):
        load([{**row, "chosen": row["chosen"][:2], "rejected": talk[:2]}, row], kind)


def test_answers_to_different_conversations_are_refused(load):
    same = [QUESTION, said("0"), QUESTION, said("is it?")]
    other = [QUESTION, said("1"), QUESTION, said("it is.")]
    message = r"row 2 of .* message 2 is '0' in one and '1' in the other"
    with pytest.raises(ValueError, match=message):
        load(
            [
                {"chosen": same, "rejected": [*same[:3], said("no")]},
                {"chosen": same, "rejected": other},
            ],
            "chat_template.argilla_chat",
        )


def test_whole_conversations_beside_a_prompt(load):
    """A text prompt is refused; with messages as prompt a type reads them."""
    row = {"chosen": [QUESTION, said("0")], "rejected": [QUESTION, said("1")]}
    with pytest.raises(ValueError, match="row 1 .*: `chosen` is a list, not a text"):
        load([{"prompt": "0 plus 0?", **row}], None)
    row = {"prompt": [QUESTION], **row}
    with pytest.raises(
        ValueError, match="row 1 .*set `type: chat_template.default` and"
    ):
        load([row], None, skip_prepare_dataset=True)
    (found,) = load([row], entry={"field_messages": "prompt"})
    assert found["prompt"].count("0 plus 0?") == 1 and found["chosen"] == "0</s>"


def test_a_tokenizer_without_an_end_of_text_is_refused(load, tmp_path, parts):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="tokenizer of `.*own` has no end of text: set"
    ):
        load([asked("a", "b")], tokenizer_config=str(tmp_path / "own"))


def test_a_role_that_the_template_refuses_is_named_with_its_row(load):
    rows = [asked("a", "b"), asked("a", "b")]
    rows[1]["messages"] = [{"role": "system", "content": "Be brief."}, QUESTION]
    template = "{% for m in messages %}{% if m.role == 'system' %}"
    template += "{{ raise_exception('System role not supported') }}{% endif %}"
    template += "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    message = (
        r"row 2 of `a.jsonl` .*refuses messages of system, user, assistant: System "
    )
    with pytest.raises(ValueError, match=message):
        load(rows, chat_template="jinja", chat_template_jinja=template)


def test_prepared_data_follow_their_files_template_and_options(load, caplog):
    caplog.set_level("INFO")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    keys = {"chat_template": "jinja", "chat_template_jinja": template}
    first = load([asked("a", "b")], **keys)
    caplog.clear()
    assert load([asked("a", "b")], **keys) == first and "anew" not in caplog.text
    swapped = load([asked("b", "a")], **keys)
    assert swapped[0]["chosen"] == first[0]["rejected"]
    assert "prepared anew, as the contents of `a.jsonl` changed." in caplog.text
    keys["chat_template_jinja"] = template.replace(": ", " said ")
    (renamed,) = load([asked("b", "a")], **keys)
    assert renamed["prompt"] == "user said 0 plus 0?\n"
    assert "prepared anew, as the chat template changed." in caplog.text
    caplog.clear()
    load([asked("b", "a")], **keys, excess_length_strategy="truncate")
    assert "prepared anew, as `excess_length_strategy` changed." in caplog.text


def test_a_file_that_cannot_be_read_is_named(load, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen"\n')
    with pytest.raises(ValueError, match="`datasets`: `bad.jsonl` cannot be read: "):
        load([], entry={"path": "bad.jsonl"})


@pytest.mark.parametrize("command", ["preprocess", "train", "evaluate"])
def test_every_command_says_the_same(recipe, tmp_path, command):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    rows.append({"prompt": "a", "chosen": None, "rejected": "c"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    entry = {"path": str(tmp_path / "a.jsonl"), "type": "chatml.prompt_pairs"}
    tiny.write(tmp_path, recipe(datasets=[entry], dataset_prepared_path="prepared"))
    launcher = () if command == "preprocess" else ("--launcher", "python")
    done = forked(tmp_path, command, "recipe.yml", *launcher)
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("ValueError: `datasets`: row 4 of `")
    assert last.endswith("`chosen` is empty: remove the row")


def test_messages_without_a_type_are_divided_by_trl_or_refused(load, tmp_path):
    """TRL cuts after the prompt's tokens, whatever they are."""
    row = {"prompt": [QUESTION], "chosen": [said("a")], "rejected": [said("b")]}
    thinks = {"chat_template": "jinja", "chat_template_jinja": OPENS_THOUGHTS}
    with pytest.raises(ValueError, match="row 1 .*TRL would cut the answer: set `type"):
        load([row], None, **thinks)
    (found,) = load([row], None, **thinks, chat_template_kwargs={"thinks": False})
    assert found["chat_template_kwargs"] == {"thinks": False}
    (found,) = load([row], entry={"field_messages": "prompt"}, **thinks)
    assert found["prompt"] == "user: 0 plus 0?\nassistant: "
    assert (found["chosen"], found["rejected"]) == ("a</s>", "b</s>")


def test_sequence_len_counts_tokens_as_they_are_trained(load):
    """With `eos_token`; axolotl counts texts without it."""
    rows = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in (8, 9, 20)]
    rows.append({"prompt": "a" * 10, "chosen": "b", "rejected": "c"})

    def kept(**keys) -> list[int]:
        found = load(rows, None, sequence_len=10, **keys)
        return [len(row["chosen"]) for row in found]

    assert kept() == [8]
    assert kept(excess_length_strategy="truncate") == [8, 9, 20]
    with pytest.raises(ValueError, match="row 2 of `a.jsonl`: it has 11 tokens, more"):
        kept(excess_length_strategy="raise")


@pytest.mark.parametrize("kind", ["chatml.prompt_pairs", {"prompt_format": "{prompt}"}])
def test_columns_that_a_type_for_text_does_not_read_are_refused(load, kind):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "good": "d"}
    with pytest.raises(
        ValueError, match="chosen: good`.*only `chat_template` types read"
    ):
        load([row], kind, entry={"field_chosen": "good"})
    with pytest.raises(
        ValueError, match="`datasets: type: feild_chosen: good`.*keys are"
    ):
        load([row], {"feild_chosen": "good"})


def test_an_empty_value_is_refused_where_it_would_be_text(load):
    """Not where it says that there is none: a system prompt, for example."""
    row = {"system": None, "prompt": "a", "chosen": "None of it.", "rejected": "c"}
    (found,) = load([row], "chatml.prompt_pairs")
    assert found["prompt"].count("system") == 0
    rows = [{**row, "system": ""}, {**row, "system": "", "prompt": None}]
    with pytest.raises(ValueError, match="row 2 of `a.jsonl` .*: `prompt` is empty"):
        load(rows, "chatml.prompt_pairs")


def test_a_prompt_that_is_not_the_question_is_refused(load):
    row = {"prompt": "1 plus 1?", "chosen": [QUESTION, said("0")]}
    row["rejected"] = [QUESTION, said("1")]
    with pytest.raises(ValueError, match="`prompt` is '1 plus 1.*answers '0 plus 0"):
        load([row], "llama3.ultra")
    (found,) = load([{**row, "prompt": " 0 plus 0?"}], "llama3.ultra")
    assert found["chosen"] == "0<|eot_id|>"
