"""Every type of preference data and every option of `datasets:`, against `rl: dpo`.

The same recipe is loaded under `rl: edpo` and under `rl: dpo`, each by axolotl: the
prepared pairs must be equal, and so must tokens and scored tokens of an epoch's
batches as each trainer lays them.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import axolotl.prompt_strategies.dpo as shipped
import axolotl.prompt_strategies.dpo.chat_template as shipped_chat
import pytest
import torch
from axolotl.utils.schemas.datasets import SFTDataset
from datasets import Dataset, disable_caching, enable_caching
from helpers import matrix, tiny
from helpers.matrix import Cell
from tokenizers.processors import TemplateProcessing

from axolotl_edpo.data.completions import completions_of
from axolotl_edpo.trainer import EDPOTrainer

TITLE = "Data sets"
INTRO = """
"Works" means: the pairs that axolotl prepares, and the tokens and scored tokens in the
batches of an epoch, are those of the same recipe with `rl: dpo`.
"""

# Up to 0.20, `chat_template` types find an answer by searching for its text.
CUTS_ANSWERS = not hasattr(shipped_chat, "_completion_after_prompt")

# system, question, chosen, rejected
TALKS = [
    ("", "Is red a colour?", "It is.", "Red is a number."),
    ("Be brief.", "Cats?", "They sleep.", "Cats sleep for most of the day."),
    ("", "And dogs?", "Dogs run.\nThen they sleep.", "No."),
    ("Be kind.", "Grüße, was ist das? 你好", "Ein Gruß. 你好!", "Nichts."),
    ("", "What is two and two?", "Four.", "Five, or so they say."),
    ("Be sure.", "Why?", "Because.", "I do not know why."),
    ("", "Where do you live?", "Here.", "There, and sometimes elsewhere."),
    ("", "When is today?", "Today is today, and not tomorrow.", "Now."),
    ("Be fast.", "Blue?", "Yes.", "No, never."),
    ("", "Small or big?", "Small, as you can see.", "Big."),
]


def rows(make: Callable[..., dict]) -> list[dict]:
    """A row of data for each of TALKS."""
    return [make(*talk) for talk in TALKS]


def turns(*texts: str) -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return [
        {"role": role, "content": text}
        for role, text in zip(roles, texts, strict=False)
    ]


def plain(prompt="prompt", chosen="chosen", rejected="rejected") -> list[dict]:
    """Columns of text."""
    return rows(lambda s, q, c, r: {"system": s, prompt: q, chosen: c, rejected: r})


TEXT = plain()
TALK = rows(lambda s, q, c, r: {"chosen": turns(q, c), "rejected": turns(q, r)})
ULTRA = [
    {"system": text["system"], "prompt": text["prompt"], **talk}
    for text, talk in zip(TEXT, TALK, strict=True)
]
MESSAGES = rows(
    lambda s, q, c, r: {
        "messages": turns(q),
        "chosen": turns(c, c)[1],
        "rejected": turns(r, r)[1],
    }
)
RANKED = rows(
    lambda s, q, c, r: {
        "prompt": q,
        "answers": [{"answer": c, "rank": 3}, {"answer": r, "rank": 2}],
    }
)
CUSTOM = """
def shout(cfg, **kwargs):
    def transform_fn(sample):
        return {
            "prompt": sample["q"].upper() + "\\n",
            "chosen": sample["yes"],
            "rejected": sample["no"],
        }
    return transform_fn, {"remove_columns": ["q", "yes", "no"]}
"""


@dataclass(frozen=True)
class Data(Cell):
    """A cell with data.

    Attributes:
        files: Rows of each file that the recipe reads.
        options: What the entry of `datasets:` has beside path and type.
        ours: Keys for `rl: edpo` alone.
        first: What the first chosen sequence of the prepared data reads.
        pairs: How many pairs an epoch has.
        evals: How many pairs an evaluation has.
        trains: Whether the recipe is also trained.
        differs: Whether `rl: dpo` of this axolotl trains other tokens, wrong ones.
        dpo_refuses: What `rl: dpo` says, if it is not `refused`.
    """

    files: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    first: str = ""
    pairs: int = len(TALKS)
    evals: int = 0
    trains: bool = False
    differs: bool = False
    dpo_refuses: str = ""


@dataclass(frozen=True)
class Type(Data):
    """A cell of a type that axolotl ships, with the type's rows."""

    type: Any = ""


def chatml(name: str, data: list[dict]) -> Type:
    text = "<|im_start|>user\nIs red a colour?<|im_end|>\n<|im_start|>assistant\n"
    return _typed(f"chatml.{name}", data, text + "It is.<|im_end|>")


def llama3(name: str, data: list[dict]) -> Type:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = head.format("user") + "Is red a colour?<|eot_id|>" + head.format("assistant")
    return _typed(f"llama3.{name}", data, text + "It is.<|eot_id|>")


def _typed(kind: str, data: list[dict], text: str, **more) -> Type:
    first = text + "</s>"
    return Type(f"`{kind}`", type=kind, files={"a.jsonl": data}, first=first, **more)


OWN_CHAT = "[user]Is red a colour?</s>[assistant]It is."
TYPES = [
    _typed("chat_template.default", MESSAGES, OWN_CHAT, trains=True),
    _typed("chat_template.argilla_chat", TALK, OWN_CHAT),
    *(
        make(name, data)
        for make in (chatml, llama3)
        for name, data in {
            "default": plain("instruction", "chosen_response", "rejected_response"),
            "argilla_chat": TALK,
            "icr": plain("input"),
            "intel": plain("question"),
            "prompt_pairs": TEXT,
            "ultra": ULTRA,
        }.items()
    ),
    _typed(
        "zephyr.nectar",
        RANKED,
        "<|system|>\n</s>\n<|user|>\nIs red a colour?</s>\n<|assistant|>\nIt is.",
        note="the answer with the highest `rank` is chosen, the next one rejected",
    ),
    _typed("passthrough.default", TEXT, "Is red a colour?It is."),
    Type(
        "`type:` with `field_*` and `*_format` (`user_defined.default`)",
        type="user_defined.default",
        files={"a.jsonl": plain("q", "yes", "no")},
        options={
            "type": {
                "field_prompt": "q",
                "field_chosen": "yes",
                "field_rejected": "no",
                "field_system": "system",
                "prompt_format": "{system}Q: {prompt}\nA:",
                "chosen_format": " {chosen}!",
                "rejected_format": " {rejected}?",
            }
        },
        first="Q: Is red a colour?\nA: It is.!</s>",
    ),
]
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|></s>"
FIRST = CHATML.format("Is red a colour?", "It is.")
PLAIN = {"files": {"a.jsonl": TEXT}, "options": {"type": "chatml.prompt_pairs"}}
LONG_TALK = rows(
    lambda s, q, c, r: {
        "messages": [{"role": "system", "content": "Be good."}, *turns(q, r, "Sure?")],
        "chosen": turns(q, c)[1],
        "rejected": turns(q, r)[1],
    }
)
CONVERSATIONS = [
    {
        "prompt": talk["messages"],
        "chosen": [talk["chosen"]],
        "rejected": [talk["rejected"]],
    }
    for talk in LONG_TALK
]
LONG_CHAT = "[system]Be good.</s>[user]Is red a colour?</s>[assistant]Red is a number."
LONG_CHAT += "</s>[user]Sure?</s>[assistant]It is.</s>"
JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ tools | length }} tools: {{ tools[0].function.name }} {% endif %}"
)
TOOL = {"type": "function", "function": {"name": "now", "description": "Time."}}


def with_template(template: str, begins: bool = False) -> Callable[[str], None]:
    """Saves a tokenizer with a chat template; `begins`: it puts <s> before a text."""

    def save(name: str) -> None:
        tokenizer = tiny.byte_tokenizer()
        tokenizer.chat_template = template
        if begins:
            start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
            tokenizer.backend_tokenizer.post_processor = start
        tokenizer.save_pretrained(name)

    return save


OTHERS = [
    Data(
        "no `type`: columns `prompt`, `chosen`, `rejected`",
        files={"a.jsonl": TEXT},
        first="Is red a colour?It is.</s>",
    ),
    Data(
        "no `type`: messages, by the tokenizer's own chat template",
        files={"a.jsonl": CONVERSATIONS},
        first=LONG_CHAT,
        note="with `skip_prepare_dataset: true`",
    ),
    Data(
        "messages without `skip_prepare_dataset: true`",
        {"skip_prepare_dataset": None},
        files={"a.jsonl": CONVERSATIONS},
        dpo_refuses="text input must be of type `str`",
        first=LONG_CHAT,
        note="`rl: dpo` fails: it measures text only",
    ),
    Data(
        "`tools` beside messages",
        {"tokenizer_config": "own"},
        files={
            "a.jsonl": [{**talk, "tools": [TOOL]} for talk in CONVERSATIONS],
            "own": with_template(TOOLS + tiny.CHAT_TEMPLATE),
        },
        first="1 tools: now " + LONG_CHAT,
        note="without a `type`; with `chat_template` types as "
        "[data.md](data.md#tool-calls-reasoning-chat-templates) says",
    ),
    Data(
        "a type of one's own: `file.function`",
        files={"a.jsonl": plain("q", "yes", "no"), "my_pairs.py": CUSTOM},
        options={"type": "my_pairs.shout"},
        first="IS RED A COLOUR?\nIt is.</s>",
        note="the file's folder must be in `PYTHONPATH`",
    ),
    Data(
        "a type of one's own in a package: `package.file.function`",
        files={
            "a.jsonl": plain("q", "yes", "no"),
            "my/pairs.py": CUSTOM,
            "my/__init__.py": "",
        },
        options={"type": "my.pairs.shout"},
        refused="Failed to load dataset transform function for type 'my.pairs.shout'",
        note="axolotl finds a file at the top of `PYTHONPATH` only",
    ),
    Data(
        "a `type` that does not exist",
        files={"a.jsonl": TEXT},
        options={"type": "chatml.none"},
        refused="Failed to load dataset transform function for type 'chatml.none'",
        note="by axolotl",
    ),
    Data(
        "system prompts and several turns",
        files={"a.jsonl": LONG_TALK},
        options={"type": "chat_template.default"},
        first=LONG_CHAT,
    ),
    Data(
        "`chat_template: chatml`",
        {"chat_template": "chatml"},
        files={"a.jsonl": MESSAGES},
        options={"type": "chat_template.default"},
        first=FIRST,
    ),
    Data(
        "`chat_template: jinja` with a file as `chat_template_jinja`",
        {"chat_template": "jinja", "chat_template_jinja": "own.jinja"},
        files={"a.jsonl": MESSAGES, "own.jinja": JINJA},
        options={"type": "chat_template.default"},
        # it knows no `add_generation_prompt`
        first="<user>Is red a colour?</user><assistant>It is.</assistant></s>",
        differs=CUTS_ANSWERS,
    ),
    Data(
        "a tokenizer that begins a text with `<s>`, a template that does too",
        {"tokenizer_config": "own"},
        files={
            "a.jsonl": MESSAGES,
            "own": with_template("{{ bos_token }}" + tiny.CHAT_TEMPLATE, begins=True),
        },
        options={"type": "chat_template.default"},
        first="<s>" + OWN_CHAT + "</s>",
        note="`rl: dpo` has `<s>` twice",
        differs=True,
    ),
    Data(
        "`field_messages`, `field_chosen`, `field_rejected`",
        files={
            "a.jsonl": [
                {"conv": m["messages"], "yes": m["chosen"], "no": m["rejected"]}
                for m in MESSAGES
            ]
        },
        options={
            "type": "chat_template.default",
            "field_messages": "conv",
            "field_chosen": "yes",
            "field_rejected": "no",
        },
        first=OWN_CHAT + "</s>",
    ),
    Data(
        "`split: train[:50%]`",
        **{**PLAIN, "options": {**PLAIN["options"], "split": "train[:50%]"}},
        first=FIRST,
        pairs=5,
    ),
    Data(
        "a Parquet file",
        files={"a.parquet": TEXT},
        options={"type": "chatml.prompt_pairs", "ds_type": "parquet"},
        first=FIRST,
        note="`ds_type` is ignored beside `rl`: the file's name says what it is",
    ),
    Data(
        "a CSV file",
        files={"a.csv": TEXT},
        options={"type": "chatml.prompt_pairs"},
        first=FIRST,
    ),
    Data(
        "a folder of `save_to_disk` (Arrow)",
        files={"arrow": TEXT},
        options={"type": "chatml.prompt_pairs"},
        first=FIRST,
    ),
    Data(
        "a folder of files",
        files={"many/1.jsonl": TEXT[:6], "many/2.jsonl": TEXT[6:]},
        options={"type": "chatml.prompt_pairs", "path": "many"},
        first=FIRST,
    ),
    Data(
        "`data_files` of a folder",
        files={"many/1.jsonl": TEXT[:6], "many/2.jsonl": TEXT[6:]},
        options={
            "type": "chatml.prompt_pairs",
            "path": "many",
            "data_files": ["many/1.jsonl"],
            "split": "train",
        },
        first=FIRST,
        pairs=6,
    ),
    Data(
        "`shuffle_merged_datasets`, `shuffle_before_merging_datasets`",
        {
            "datasets": [
                {"path": "a.jsonl", "type": "chatml.ultra"},
                {"path": "b.jsonl", "type": "llama3.prompt_pairs"},
            ],
            "shuffle_merged_datasets": True,
            "shuffle_before_merging_datasets": True,
        },
        files={"a.jsonl": ULTRA, "b.jsonl": TEXT},
        first="<|im_start|>system\nBe brief.<|im_end|>\n"
        + CHATML.format("Cats?", "They sleep."),  # by seed 7
        pairs=20,
    ),
    Data(
        "`val_set_size`",
        {"val_set_size": 0.3, "eval_steps": 1},
        **PLAIN,
        first=FIRST,
        pairs=7,
        evals=3,
        trains=True,
    ),
    Data(
        "`test_datasets`, of another type",
        {"test_datasets": [{"path": "b.jsonl", "type": "llama3.ultra"}]},
        files={"a.jsonl": TEXT, "b.jsonl": ULTRA},
        options=PLAIN["options"],
        first=FIRST,
        evals=10,
    ),
    Data(
        "`streaming: true`",
        {"streaming": True, "max_steps": 2},
        **PLAIN,
        first=FIRST,
        note="has no effect beside `rl`, and needs `max_steps`",
    ),
    Data(
        "`sequence_len` with `excess_length_strategy: raise`",
        {
            "sequence_len": 64,
            "excess_length_strategy": "raise",
            "skip_prepare_dataset": None,
        },
        **PLAIN,
        refused=r"row 1 of `a.jsonl` .*: it has 93 tokens, more than `sequence_len: 64",
        dpo_refuses="Sample exceeds configured sequence_len",
        note="if a pair is longer",
    ),
    Data(
        "`skip_prepare_dataset: true`, pairs longer than `sequence_len`",
        {"sequence_len": 76},
        **PLAIN,
        first=FIRST,
        pairs=6,  # four prompts have 76 tokens or more
        note="TRL truncates; pairs of which the prompt alone fills it are dropped",
    ),
    Data(
        "`dataloader_num_workers`, `dataloader_prefetch_factor`",
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
        **PLAIN,
        first=FIRST,
        trains=True,
    ),
    Data(
        "`dataloader_drop_last`, `dataset_processes`",
        {
            "dataloader_drop_last": True,
            "dataset_num_proc": None,
            "dataset_processes": 2,
        },
        **PLAIN,
        first=FIRST,
        note="axolotl hands `dataloader_drop_last` on in SFT only: no pair is dropped",
    ),
    Data(
        "`sequence_len` with `excess_length_strategy: drop`, or without",
        {"sequence_len": 110, "skip_prepare_dataset": None},
        **PLAIN,
        first=FIRST,
        pairs=6,  # 135, 144, 120 and 113 tokens are too many
    ),
    Data(
        "`sequence_len` with `excess_length_strategy: truncate`",
        {
            "sequence_len": 110,
            "excess_length_strategy": "truncate",
            "skip_prepare_dataset": None,
        },
        **PLAIN,
        first=FIRST,
        pairs=9,  # a prompt of 116 tokens has no room for an answer
        note="`rl: dpo` trains `eos_token` at the end of a truncated answer",
        differs=True,
    ),
    Data(
        "an empty answer",
        {"skip_prepare_dataset": None},
        files={"a.jsonl": [*TEXT, {**TEXT[0], "rejected": ""}]},
        refused="row 11 of `a.jsonl`: `rejected` has no text: remove the row",
        dpo_refuses="Prompt, chosen and rejected keys are required",
    ),
    Data(
        "`dpo_padding_free: true`",
        **PLAIN,
        ours={"dpo_padding_free": True},
        first=FIRST,
    ),
    Data(
        "`dpo_padding_free: true`, `edpo_prefix_sharing: false`",
        **PLAIN,
        ours={"dpo_padding_free": True, "edpo_prefix_sharing": False},
        first=FIRST,
    ),
    Data(
        "`sample_packing: true`",
        **PLAIN,
        ours={"sample_packing": True},
        first=FIRST,
        trains=True,
    ),
]
CHAT = {"path": "a.jsonl", "type": "chat_template.default"}
FORMAT = {"type": {"prompt_format": "Q: {prompt} A:"}}


@dataclass(frozen=True)
class Ignored(Data):
    """A cell with an option that axolotl ignores beside `rl`.

    Attributes:
        same: Keys that give the same under `rl: dpo`.
    """

    same: Mapping[str, Any] = field(default_factory=dict)


def of_entry(
    name: str, refused: str, option: dict, remedy: str, missing: str = ""
) -> Ignored:
    """A cell with an option of an entry of `datasets:`."""
    return Ignored(
        name,
        {"datasets": [{**CHAT, **option}]},
        refused,
        note=f"axolotl ignores it beside `rl`: {remedy}",
        files={"a.jsonl": MESSAGES},
        same={"datasets": [CHAT]},
        missing=missing,
    )


IGNORED = [
    of_entry(
        "`chat_template`, `chat_template_jinja` of an entry of `datasets:`",
        r"`datasets: chat_template: chatml`.*whole recipe",
        {"chat_template": "chatml"},
        "set it for the whole recipe",
    ),
    of_entry(
        "`message_property_mappings` of an entry",
        r"`datasets: message_property_mappings: \{role: from, .*\}`.*`content`",
        {"message_property_mappings": {"role": "from", "content": "value"}},
        "name them `role` and `content` in the data",
    ),
    of_entry(
        "`roles` of an entry",
        r"`datasets: roles: \{user: \[human\]\}`.*in the data",
        {"roles": {"user": ["human"]}},
        "name them as the template does in the data",
    ),
    of_entry(
        "`shards`, `preprocess_shards` of an entry",
        r"`datasets: shards: 2`.*`split: train\[:10%\]`",
        {"shards": 2},
        "set `split: train[:10%]`",
    ),
    of_entry(
        "`weight` of an entry",
        r"`datasets: weight: 0.5`.*`split: train\[:50%\]`",
        {"weight": 0.5},
        "set `split: train[:50%]`",
        missing=matrix.without("weight", SFTDataset.model_fields),
    ),
    Ignored(
        "`dataset_shard_num`",
        {"datasets": [CHAT], "dataset_shard_num": 2, "dataset_shard_idx": 0},
        r"`dataset_shard_num: 2`.*`split: train\[:10%\]`",
        note="axolotl ignores it beside `rl`: set `split: train[:10%]`",
        files={"a.jsonl": MESSAGES},
        same={"dataset_shard_num": None, "dataset_shard_idx": None},
    ),
    Ignored(
        "a `type` with `field_*` or `*_format` in `test_datasets`",
        {
            "datasets": [{"path": "a.jsonl", **FORMAT}],
            "test_datasets": [{"path": "a.jsonl", **FORMAT}],
        },
        r"`test_datasets: type: \{prompt_format: .*\}`.*without `type`",
        note="axolotl removes its keys: save the texts as columns, without `type`",
        files={"a.jsonl": TEXT},
        same={"test_datasets": [{"path": "a.jsonl"}]},
    ),
]
EVERY_TYPE = Data(
    "entries of every type in one recipe, `dataset_exact_deduplication`; a second run "
    "reads `dataset_prepared_path`",
    {
        "datasets": [
            {"path": f"{cell.type}.jsonl", "type": cell.type, **cell.options}
            for cell in TYPES
        ],
        "dataset_exact_deduplication": True,
        "skip_prepare_dataset": None,
    },
    files={f"{cell.type}.jsonl": cell.files["a.jsonl"] for cell in TYPES},
    first=OWN_CHAT + "</s>",
    # both chat templates give the same rows, so do prompt_pairs and ultra, twice
    pairs=(len(TYPES) - 3) * len(TALKS),
)
BESIDE = Data(
    "a column `messages` beside prompt, chosen and rejected",
    files={"a.jsonl": [{**row, "messages": row["chosen"]} for row in ULTRA]},
    options={"type": "chatml.ultra"},
    first=FIRST,
    note="with `rl: dpo`, the last `eos_token` is then there in some processes only",
)
CELLS = [*TYPES, EVERY_TYPE, *OTHERS, BESIDE, *IGNORED]


# --- comparing -------------------------------------------------------------------


def paths(batch: Mapping[str, Any]) -> list[list[int]]:
    """Where in the rows of our batch the tokens of each sequence are."""
    if "segments" not in batch:
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [[*range(i * width, i * width + n)] for i, n in enumerate(lengths)]
    pieces, start = [], 0
    for length in batch["segments"].pieces:
        pieces.append([*range(start, start + length)])
        start += length
    found = [sum((pieces[k] for k in keys), []) for keys in batch["segments"].keys]
    return found[::2] + found[1::2]  # a pair's two follow each other in the row


def sequences(batch: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens of each sequence, and the indices of those that are scored.

    Args:
        batch: TRL's, or ours of any layout.
    """
    if "completion_mask" in batch:
        masks = zip(batch["attention_mask"], batch["completion_mask"], strict=True)
        return [
            (ids[real.bool()].tolist(), scored.nonzero()[:, 0].tolist())
            for ids, (real, scored) in zip(batch["input_ids"], masks, strict=True)
        ]
    tokens, done = batch["input_ids"].flatten(), completions_of(batch)
    found = []
    scored = zip(*(v.split(done.lengths.tolist()) for v in done[:2]), strict=True)
    for path, (positions, targets) in zip(paths(batch), scored, strict=True):
        after = [path.index(position) + 1 for position in positions.tolist()]
        ids = tokens[path].tolist()
        assert [ids[i] for i in after] == targets.tolist()
        found.append((ids, after))
    return found


def pairs_of(batches: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Chosen and rejected of each pair, as `sequences` gives them."""
    pairs = []
    for batch in batches:
        both = sequences(batch)
        half = len(both) // 2
        pairs += zip(both[:half], both[half:], strict=True)
    return pairs


def ids_of(dataset: Dataset) -> list[dict]:
    """The tokens of prepared data."""
    return dataset.select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids"]
    ).to_list()


def steps(trainer) -> list[list[Mapping[str, Any]]]:
    """The laid micro-batches of each optimizer step of an epoch."""
    loader = iter(trainer.get_train_dataloader())
    count = trainer.args.gradient_accumulation_steps
    step = functools.partial(
        trainer.get_batch_samples, loader, count, trainer.args.device
    )
    return [*iter(lambda: step()[0], [])]


def evaluated(trainer) -> list[Mapping[str, Any]]:
    """The batches of an evaluation, as the trainer lays them."""
    if trainer.eval_dataset is None:
        return []
    batches = [*trainer.get_eval_dataloader()]
    if not isinstance(trainer, EDPOTrainer):
        return batches
    return [
        trainer.batcher.collators["eval"](batch["examples"].pairs) for batch in batches
    ]


def assert_same_rows(ours: Sequence, dpo: Sequence, deals: bool = False) -> None:
    """Our batches hold the pairs of TRL's, and padded ones are the same tensors.

    Args:
        ours: Batches of a `PairCollator`.
        dpo: TRL's.
        deals: Whether the pairs may be in another order.
    """
    mine, theirs = pairs_of(ours), pairs_of(dpo)
    if deals:
        mine, theirs = sorted(mine), sorted(theirs)
    assert mine == theirs
    for a, b in zip(ours, dpo, strict=True):
        for name in ("input_ids", "attention_mask"):
            assert "segments" in a or torch.equal(a[name], b[name])


def assert_same_pairs(ours, dpo) -> tuple[int, int]:
    """Prepared data and batches, of training and evaluation, are those of `rl: dpo`.

    Args:
        ours: An `EDPOTrainer`.
        dpo: axolotl's trainer.

    Returns:
        How many pairs an epoch and an evaluation have.
    """
    assert ids_of(ours.train_dataset) == ids_of(dpo.train_dataset)
    trained, evals = steps(ours), evaluated(ours)
    for mine, theirs in zip(trained, steps(dpo), strict=True):
        assert_same_rows(mine, theirs, ours.batcher.layout.balances)
    assert_same_rows(evals, evaluated(dpo))
    return len(pairs_of(sum(trained, []))), len(pairs_of(evals))


# --- running ---------------------------------------------------------------------

WRITERS = {
    ".jsonl": Dataset.to_json,
    ".parquet": Dataset.to_parquet,
    ".csv": Dataset.to_csv,
    "": Dataset.save_to_disk,
}


def as_dpo(keys: dict, **more) -> dict:
    """The same recipe for `rl: dpo`, with prepared data of its own."""
    own = {**tiny.DPO, "dataset_prepared_path": "prepared-by-dpo"}
    given = {**keys, **own, **more}.items()
    return {key: value for key, value in given if value is not None}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Recipes name files of the current folder; nothing is taken from a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    disable_caching()
    yield
    enable_caching()


def write(files: Mapping[str, Any]) -> None:
    """Rows in the format that a name ends with, text, or what a function makes."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(name)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            WRITERS[path.suffix](Dataset.from_list(content), name)


def keys_of(cell: Data, recipe: Callable[..., dict]) -> dict:
    """The cell's recipe; processes of one's own for tiny data would take seconds."""
    entry = {"path": next(iter(cell.files)), "type": getattr(cell, "type", None)}
    base = dict(
        datasets=[{**entry, **cell.options}],
        dataset_prepared_path="prepared",
        dataset_num_proc=0,
        dataloader_num_workers=0,
        skip_prepare_dataset=True,
        shuffle_merged_datasets=False,
        sequence_len=512,
    )
    return recipe(**{**base, **cell.keys})


def _built(cell, folder, keys):
    return tiny.build(folder, keys)


def chosen_text(trainer, pair: int) -> str:
    """What a chosen sequence of the prepared data reads."""
    ids = trainer.train_dataset[pair]
    return trainer.processing_class.decode(ids["prompt_ids"] + ids["chosen_ids"])


def is_first(cell: Data) -> bool:
    """All but repetitions: the types of one template of text, one kind of file."""
    return "llama3." not in cell.name and cell.name not in (
        "a CSV file",
        "a Parquet file",
    )


@matrix.cells([*TYPES, *OTHERS], is_first)
def test_the_pairs_are_those_of_dpo(cell, recipe, tmp_path):
    write(cell.files)
    keys = keys_of(cell, recipe)
    if cell.refused:
        with pytest.raises(ValueError, match=cell.refused):
            tiny.load_data(tiny.load_config(tmp_path, keys))
    if dpo_refuses := cell.dpo_refuses or cell.refused:
        with pytest.raises(ValueError, match=dpo_refuses):
            tiny.load_data(tiny.load_config(tmp_path, as_dpo(keys)))
    if cell.refused:
        return
    run = matrix.assert_cell if cell.trains else _built
    ours = run(cell, tmp_path, {**keys, **cell.ours})
    assert chosen_text(ours, 0) == cell.first
    if dpo_refuses:
        return
    dpo = tiny.build(tmp_path, as_dpo(keys))
    if cell.differs:
        assert ids_of(ours.train_dataset) != ids_of(dpo.train_dataset)
    else:
        assert assert_same_pairs(ours, dpo) == (cell.pairs, cell.evals)


@matrix.cells([EVERY_TYPE])
def test_prepared_data_is_read_again(cell, recipe, tmp_path):
    write(cell.files)
    keys = keys_of(cell, recipe)
    dpo = tiny.build(tmp_path, as_dpo(keys))
    ours = tiny.build(tmp_path, keys)
    assert assert_same_pairs(ours, dpo) == (cell.pairs, cell.evals)
    assert chosen_text(ours, 0) == cell.first
    for name in cell.files:
        Path(name).unlink()
    again = tiny.build(tmp_path, keys)
    assert ids_of(again.train_dataset) == ids_of(ours.train_dataset)


@matrix.cells([BESIDE])
def test_a_column_of_no_pair_changes_nothing(cell, recipe, tmp_path):
    """Nor does the process: TRL chooses one of the columns by its hash."""
    write(cell.files)
    ours = tiny.build(tmp_path, keys_of(cell, recipe))
    assert "messages" not in ours.train_dataset.column_names
    assert chosen_text(ours, 0) == cell.first
    write({"a.jsonl": ULTRA})
    dpo = tiny.build(tmp_path, as_dpo(keys_of(cell, recipe)))
    assert_same_pairs(ours, dpo)


def test_prepared_data_knows_its_strategy(recipe, tmp_path):
    cell = Data("", {"sequence_len": 110, "skip_prepare_dataset": None}, **PLAIN)
    write(cell.files)
    dropped, truncated, again = (
        tiny.load_data(tiny.load_config(tmp_path, {**keys_of(cell, recipe), **keys}))
        for keys in (
            {},
            {"excess_length_strategy": "truncate"},
            {},
        )
    )
    assert [len(m.train_dataset) for m in (dropped, truncated, again)] == [6, 9, 6]


@matrix.cells(IGNORED)
def test_what_axolotl_ignores_is_refused(cell, recipe, tmp_path):
    write(cell.files)
    keys = keys_of(cell, recipe)
    with pytest.raises(ValueError, match=cell.refused):
        tiny.load_data(tiny.load_config(tmp_path, keys))
    told, untold = (
        tiny.load_data(tiny.load_config(tmp_path, as_dpo({**keys, **same})))
        for same in ({}, cell.same)
    )
    assert told.train_dataset.to_list() == untold.train_dataset.to_list()
    if untold.eval_dataset:
        assert told.eval_dataset.to_list() == untold.eval_dataset.to_list()


def test_the_comparison_finds_other_pairs_and_other_masks(recipe, tmp_path):
    """Each pair of data sets differs in one thing only."""
    swapped = [{**t, "chosen": t["rejected"], "rejected": t["chosen"]} for t in TEXT]
    moved = [{**t, "prompt": t["prompt"][:-1]} for t in TEXT]  # answers get the rest
    for mine, text in zip(moved, TEXT, strict=True):
        for side in ("chosen", "rejected"):
            mine[side] = text["prompt"][-1] + text[side]
    cell = Data("", files={"a.jsonl": TEXT})
    write({"a.jsonl": TEXT})
    keys = keys_of(cell, recipe)
    ours = tiny.build(tmp_path, keys)
    padded = steps(ours)[0]
    for other, length in ((swapped, 512), (moved, 512), (TEXT[::-1], 512), (TEXT, 30)):
        write({"a.jsonl": other})
        dpo = tiny.build(tmp_path, as_dpo(keys, sequence_len=length))
        with pytest.raises(AssertionError):
            assert_same_rows(padded, steps(dpo)[0])
        with pytest.raises(AssertionError):
            assert_same_pairs(ours, dpo)


def test_every_type_that_axolotl_ships_has_a_cell():
    found = set()
    for module in pkgutil.iter_modules(shipped.__path__, shipped.__name__ + "."):
        own = importlib.import_module(module.name)
        for name, thing in inspect.getmembers(own, inspect.isfunction):
            if thing.__module__ == own.__name__ and not name.startswith("_"):
                found.add(f"{module.name.rpartition('.')[2]}.{name}")
    assert found == {cell.type for cell in TYPES}
