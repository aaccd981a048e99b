"""axolotl edpo-inspect: what it shows is what the trainer gets."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import tiny
from helpers.commands import forked, imports_of

from axolotl_edpo.data.columns import IDS
from axolotl_edpo.inspection import pair_set
from axolotl_edpo.inspection.command import edpo_inspect

# Leaves system messages out.
NO_SYSTEM = tiny.CHAT_TEMPLATE.replace(
    "in messages %}", "in messages if m['role'] != 'system' %}"
)
LEGEND = "⟦scored⟧  not scored  ⟪cut by `sequence_len`⟫  │ between tokens  ⏎ newline"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def texts(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


TEXTS = [
    texts("Q", "a\n", "é"),
    texts("Q2", "same", "same"),
    texts("Longer", "5", "12"),
]
MESSAGES = [
    texts(user(f"Why {i}?"), assistant("so" * i), assistant("no")) for i in range(1, 6)
]
CHAT = [
    {"messages": user(f"Why {i}?"), "chosen": assistant("so"), "rejected": "n" * i}
    for i in range(1, 6)
]
# What a row is -> its rows, and the keys of its entry.
KINDS = {
    "texts": (TEXTS, {}),
    "messages that TRL renders": (MESSAGES, {}),
    "chat_template.default": (CHAT, {"type": "chat_template.default"}),
    "chat_template.argilla_chat": (
        [
            {"chosen": user("Why?") + row["chosen"], "rejected": user("Why?") + [no]}
            for row, no in zip(CHAT, assistant("no") * 5, strict=True)
        ],
        {"type": "chat_template.argilla_chat"},
    ),
    "chatml.intel": (
        [
            {"system": "", "question": "Why?", "chosen": "so", "rejected": "n" * i}
            for i in range(1, 4)
        ],
        {"type": "chatml.intel"},
    ),
    "columns of one's own": (
        TEXTS,
        {"type": {"prompt_format": "Q: {prompt}\nA: ", "field_prompt": "prompt"}},
    ),
}


def entry(folder: Path, rows: list[dict], name: str = "rows.jsonl", **keys) -> list:
    """Writes rows, and returns `datasets:` for them."""
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [{"path": str(path), "ds_type": "json", "split": "train", **keys}]


def inspect(folder: Path, keys: dict, *words: object) -> Result:
    """Runs the command on a recipe."""
    path = tiny.write(folder, keys)
    return CliRunner().invoke(edpo_inspect, [str(path), *map(str, words)])


def shown(folder: Path, keys: dict, *words: object) -> list[str]:
    """The lines that the command printed."""
    result = inspect(folder, keys, *words)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def tokens(data) -> list[list]:
    return [data[name][:] for name in IDS]


@pytest.fixture
def keys(recipe, tmp_path):
    """A function that makes a recipe of rows, with data of its own."""

    def make(rows: list[dict], of_entry: dict | None = None, **others) -> dict:
        data = entry(tmp_path, rows, **(of_entry or {}))
        of_set = dict(datasets=data, dataset_prepared_path=str(tmp_path / "prepared"))
        return recipe(**{**of_set, "shuffle_merged_datasets": False, **others})

    return make


# --- the same as in training -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_trainer(keys, tmp_path, kind):
    rows, of_entry = KINDS[kind]
    made = keys(rows, of_entry, shuffle_merged_datasets=True)
    found = pair_set.load(str(tiny.write(tmp_path, made)), "datasets")
    trainer = tiny.build(tmp_path, made)
    assert len(found) == len(rows)
    assert tokens(found.pairs) == tokens(trainer.train_dataset)
    assert found.max_length == trainer.args.max_length


@pytest.mark.parametrize("strategy", ["drop", "truncate"])
@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("chat_template.default", {"drop": 4, "truncate": 5}),
        ("messages that TRL renders", {"drop": 2, "truncate": 5}),
    ],
)
def test_pairs_that_are_too_long_are_those_of_the_trainer(
    keys, tmp_path, kind, kept, strategy
):
    """Prompts have 24 tokens, and answers of n letters n + 1."""
    rows, of_entry = KINDS[kind]
    long = {"sequence_len": 29, "excess_length_strategy": strategy}
    made = keys(rows, of_entry, **long)
    found = pair_set.load(str(tiny.write(tmp_path, made)), "datasets")
    trainer = tiny.build(tmp_path, made)
    assert tokens(found.pairs) == tokens(trainer.train_dataset)
    assert trainer.args.truncation_mode == "keep_start"
    assert (len(found), found.left_out) == (kept[strategy], 5 - kept[strategy])


def test_a_prompt_that_fills_the_sequence_is_left_out(keys, tmp_path):
    rows = [*MESSAGES, texts(user("Why, in detail?"), assistant("a"), assistant("b"))]
    made = keys(rows, sequence_len=29, excess_length_strategy="truncate")
    found = pair_set.load(str(tiny.write(tmp_path, made)), "datasets")
    assert (len(found), found.left_out) == (5, 1)
    assert tokens(found.pairs) == tokens(tiny.build(tmp_path, made).train_dataset)


@pytest.mark.parametrize("of", ["test_datasets", "val_set_size"])
def test_evaluation_pairs_are_those_of_the_trainer(keys, tmp_path, of):
    values = {
        "test_datasets": entry(tmp_path, MESSAGES, "test.jsonl"),
        "val_set_size": 0.4,
    }
    made = keys(CHAT, {"type": "chat_template.default"}, **{of: values[of]})
    path = str(tiny.write(tmp_path, made))
    found = pair_set.load(path, "test_datasets")
    trainer = tiny.build(tmp_path, made)
    assert tokens(found.pairs) == tokens(trainer.eval_dataset)
    assert len(found) == {"test_datasets": 5, "val_set_size": 2}[of]
    train = pair_set.load(path, "datasets")
    assert tokens(train.pairs) == tokens(trainer.train_dataset)
    assert (found.left_out, train.left_out) == (0, 0)


# --- what is printed ---------------------------------------------------------------


def test_pairs_and_counts_are_printed(keys, tmp_path):
    """A byte is a token; the third pair has 9 tokens and is left out."""
    lines = shown(tmp_path, keys(TEXTS, sequence_len=7))
    assert lines == [
        LEGEND,
        "",
        "pair 1 of 2 of `datasets`",
        "prompt: 1 tokens, 0 scored",
        "  Q",
        "chosen: 3 tokens, 3 scored",
        "  ⟦a│⏎",
        "  │</s>⟧",
        "rejected: 3 tokens, 3 scored",
        "  ⟦│é│</s>⟧",
        "",
        "pair 2 of 2 of `datasets`",
        "note: same: both answers have the same tokens, which teach nothing",
        "prompt: 2 tokens, 0 scored",
        "  Q│2",
        "chosen: 5 tokens, 5 scored",
        "  ⟦s│a│m│e│</s>⟧",
        "rejected: 5 tokens, 5 scored",
        "  ⟦s│a│m│e│</s>⟧",
        "",
        "`datasets`: 2 pairs, and 1 rows left out: longer than `sequence_len: 7`",
        "`datasets`: 1 of 2 pairs have the same tokens in both answers.",
        "tokens      median  longest",
        "prompt           2        2",
        "chosen           4        5",
        "rejected         4        5",
        "sequence         6        7",
    ]


def test_a_list_of_tokens_names_ids_and_what_is_cut(keys, tmp_path):
    made = keys(TEXTS[:1], sequence_len=3, excess_length_strategy="truncate")
    lines = shown(tmp_path, made, "--tokens")
    tokenizer = tiny.byte_tokenizer()
    letter, newline, *e = tokenizer("a\né")["input_ids"]
    assert lines[2:14] == [
        "pair 1 of 1 of `datasets`",
        "note: truncated: 4 tokens, more than `sequence_len: 3`",
        "prompt: 1 tokens, 0 scored",
        f'      0  not scored {tokenizer("Q")["input_ids"][0]:7}  "Q"',
        "chosen: 3 tokens, 2 scored, 1 cut",
        f'      1  scored     {letter:7}  "a"',
        f'      2  scored     {newline:7}  "⏎"',
        '      3  cut              1  "</s>", special',
        "rejected: 3 tokens, 2 scored, 1 cut",
        f"      1  scored     {e[0]:7}  Ã, a part of a character",
        f'      2  scored     {e[1]:7}  "é"',
        '      3  cut              1  "</s>", special',
    ]
    counts = "`datasets`: 1 of 1 pairs have an answer that `sequence_len: 3` truncates."
    assert counts in lines


def test_pairs_of_a_note_are_shown_and_notes_are_counted(keys, tmp_path):
    rows = [dict(row) for row in CHAT]
    for row in (rows[1], rows[3]):
        row["messages"] = [{"role": "system", "content": "Be kind."}, *row["messages"]]
    template = {"chat_template": "jinja", "chat_template_jinja": NO_SYSTEM}
    made = keys(rows, {"type": "chat_template.default"}, **template)
    lines = shown(tmp_path, made, "--note", "left out", "--pairs", 1)
    assert lines[0] == "2 of 5 pairs have this note: left out"
    assert lines[3:5] == [
        "pair 2 of 5 of `datasets`",
        "note: left out: a message of the system",
    ]
    assert sum(line.startswith("pair ") for line in lines) == 1
    assert (
        "`datasets`: 2 of 5 pairs have something that the chat template leaves out or "
        "rewrites. The first: a message of the system." in lines
    )
    assert shown(tmp_path, made, "--note", "merged")[:3] == [
        "0 of 5 pairs have this note: merged",
        "",
        "`datasets`: 5 pairs",
    ]


def test_rows_that_are_left_out_are_counted_with_the_reason(keys, tmp_path):
    made = keys([*TEXTS, TEXTS[0]], sequence_len=6, dataset_exact_deduplication=True)
    (line,) = shown(tmp_path, made, "--pairs", 0)[1:2]
    assert line == (
        "`datasets`: 1 pairs, and 3 rows left out: longer than `sequence_len: 6`, or "
        "there twice (`dataset_exact_deduplication`)"
    )


def test_prepared_data_are_shown_where_the_rows_are_not(keys, tmp_path):
    made = keys(TEXTS)
    before = shown(tmp_path, made)
    (tmp_path / "rows.jsonl").unlink()
    after = shown(tmp_path, made)
    counted = before.index("`datasets`: 3 pairs")
    assert after[counted].startswith("`datasets`: 3 pairs; rows that were left out are")
    assert before[:counted] == after[:counted]
    assert before[counted + 1 :] == after[counted + 1 :]


def test_colours_can_be_asked_for(keys, tmp_path):
    result = inspect(tmp_path, keys(TEXTS), "--color")
    assert result.exit_code == 0, result.output
    assert "\x1b[32m" in result.stdout and "\x1b[31m" in result.stdout
    assert "⟦" not in result.stdout


def test_prepared_data_are_left_to_training(keys, tmp_path):
    made = keys(TEXTS)
    shown(tmp_path, made)
    (file,) = (tmp_path / "prepared").glob("*/data-*.arrow")
    before = file.stat().st_mtime_ns
    shown(tmp_path, made)
    tiny.load_data(tiny.load_config(tmp_path, made))
    assert [*(tmp_path / "prepared").glob("*/data-*.arrow")] == [file]
    assert file.stat().st_mtime_ns == before


def test_the_folder_of_a_finished_run_is_left_alone(keys, tmp_path):
    """In a process of its own: axolotl begins a log once per process."""
    log = tmp_path / "out" / "debug.log"
    log.parent.mkdir()
    log.write_text("of the run")
    done = forked(tmp_path, "edpo-inspect", str(tiny.write(tmp_path, keys(TEXTS))))
    assert done.returncode == 0, done.stdout
    assert [*log.parent.iterdir()] == [log]
    assert log.read_text() == "of the run"


# --- what is refused ---------------------------------------------------------------


def refusal_of_training(folder: Path, keys: dict) -> str:
    with pytest.raises(ValueError) as raised:
        tiny.load_data(tiny.load_config(folder, keys))
    return str(raised.value)


@pytest.mark.parametrize("what", ["recipe", "row", "set"])
def test_what_training_refuses_is_refused_with_its_sentence(keys, tmp_path, what):
    rows = [*TEXTS, texts("Q", "a", " ")] if what == "row" else TEXTS
    made = keys(rows, sequence_len=2 if what == "set" else 99)
    made |= {"edpo_epsilon": 2} if what == "recipe" else {}
    result = inspect(tmp_path, made)
    assert result.exit_code == 1
    assert not result.stdout
    said = result.stderr.splitlines()[-1]
    assert said == f"Error: {refusal_of_training(tmp_path, made)}"
    assert {
        "recipe": "`edpo_epsilon: 2`",
        "row": "row 4 of",
        "set": "leaves no pair",
    }[what] in said


def test_other_recipes_and_sets_that_are_not_there_are_named(keys, tmp_path):
    result = inspect(tmp_path, keys(TEXTS, **tiny.DPO))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: `axolotl edpo-inspect` takes recipes with `rl: edpo`, and this is "
        "another one"
    )
    result = inspect(tmp_path, keys(TEXTS), "--split", "test_datasets")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: the recipe has no `test_datasets`: set it, or `val_set_size`, to "
        "evaluate"
    )


# --- the command -------------------------------------------------------------------


def test_axolotl_has_the_command_and_it_needs_neither_engine_nor_gpu(keys, tmp_path):
    """Needs the package installed with its entry points."""
    stage = {"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}
    (tmp_path / "zero.json").write_text(json.dumps(stage))
    made = keys(TEXTS, deepspeed=str(tmp_path / "zero.json"), bf16=True)
    path = tiny.write(tmp_path, made)
    done = forked(tmp_path, "edpo-inspect", str(path), "--pairs", "1")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    start = lines.index(LEGEND)
    assert lines[start + 2] == "pair 1 of 3 of `datasets`"
    assert lines[-1].split() == ["sequence", "7", "9"]
    assert "Traceback" not in done.stdout and "[INFO]" not in done.stdout


def test_asking_for_help_imports_neither_torch_nor_axolotl():
    printed, modules = imports_of("-m", "axolotl_edpo.inspection", "--help")
    assert "--split" in printed
    assert "click" in modules and not {"torch", "axolotl", "datasets"} & modules
