"""Wrong recipes: each is refused, or trains with one warning; nothing is lost."""

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import pytest
from helpers import matrix, processes, ranks, tiny
from helpers.commands import forked
from helpers.matrix import Cell
from helpers.tiers import first
from helpers.tiny import LORA
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    T5Config,
)

from axolotl_edpo.training.checkpointing import last_complete
from axolotl_edpo.training.finite_checks import Diverged

TITLE = "Wrong recipes"
INTRO = """
Each ends with a message that names key or file and a remedy, within 30 seconds, and
leaves the checkpoints of its `output_dir` as they were and no model beside them. Where
training goes on, there is one warning. Messages are in our words, or in those of
axolotl, transformers, PEFT or datasets where these say enough.
"""
STAGES = {
    "config": "before data are read",
    "data": "before a model is loaded",
    "model": "as the model is loaded, or before step 1",
    "training": "before the step is applied",
}


@dataclass(frozen=True)
class Wrong(Cell):
    """A cell with what is wrong; `{files}` in its keys is the fixture's folder.

    Attributes:
        stage: Where it is refused; one of STAGES.
        theirs: Whether the words are another package's, and may take several lines.
        warned: Regular expression of the one warning, where it trains.
    """

    stage: str = "config"
    theirs: bool = False
    warned: str = ""

    @property
    def verdict(self) -> str:
        if self.warned:
            return "works, with a warning"
        said = super().verdict
        return f"refused {STAGES[self.stage]}" if said == "refused" else said


def ours(name: str, refused: str, stage: str = "config", note: str = "", **keys):
    return Wrong(name, keys, refused, note=note, stage=stage)


def theirs(name: str, refused: str, stage: str = "config", note: str = "", **keys):
    return Wrong(name, keys, refused, note=note, stage=stage, theirs=True)


def warned(name: str, warned: str, note: str = "", **keys):
    return Wrong(name, keys, note=note, warned=warned)


def works(name: str, **keys):
    """What axolotl got wrong up to 0.20."""
    return Wrong(name, keys)


def data(file: str, **entry) -> list[dict]:
    """A `datasets:` entry of a chat template type."""
    (plain,) = tiny.dataset(Path("{files}") / file)
    return [{**plain, **entry}]


def texts(file: str) -> dict:
    """Keys for data that have prompt, chosen and rejected, and need no preparation."""
    entry = {"path": "{files}/" + file, "ds_type": "json", "split": "train"}
    return {"datasets": [entry], "skip_prepare_dataset": True}


JINJA = dict(chat_template="jinja")

CELLS = [
    # keys
    ours(
        "`edpo_epsilonn: 0.1`",
        r"`edpo_epsilonn: 0.1`.*did you mean `edpo_epsilon`",
        edpo_epsilonn=0.1,
    ),
    ours(
        "`leraning_rate: 1e-6`",
        r"`leraning_rate`.*did you mean `learning_rate`",
        note="one letter off a key that is not there itself; axolotl ignores such keys",
        leraning_rate=1e-6,
        learning_rate=None,
    ),
    ours(
        "`dpo_lable_smoothing: 0.1`",
        r"`dpo_lable_smoothing`.*did you mean `dpo_label_smoothing`",
        dpo_lable_smoothing=0.1,
    ),
    warned(
        "`dataset:` beside `datasets:`",
        r"`dataset`.*no effect: did you mean `datasets`",
        note="it may be an anchor",
        dataset=[],
    ),
    warned(
        "`lora_target_layers: [q_proj]`",
        r"`lora_target_layers`.*no effect: did you mean `lora_target_linear`",
        note="near a key, and not near enough to be sure",
        lora_target_layers=["q_proj"],
    ),
    Wrong(
        "`_base:`, `x-base:`",
        {"_learning_rate": 1, "x-learning_rate": 1},
        note="keys for YAML anchors are left alone",
    ),
    ours(
        "`rl: edp`, `edpo_epsilon: 0.1`",
        r"`edpo_epsilon: 0.1` has no effect with `rl: edp`: set `rl: edpo`",
        rl="edp",
        edpo_epsilon=0.1,
    ),
    theirs(
        "`rl: edp`",
        r"rl\n.*should be 'dpo'.*input_value='edp'",
        rl="edp",
        edpo_epsilon=None,
    ),
    theirs("no `base_model`", r"base_model\n.*required", base_model=None),
    theirs("no `datasets`", r"datasets.*is required", datasets=None),
    # values
    ours("`edpo_epsilon: 2`", r"`edpo_epsilon: 2`.*less than 1", edpo_epsilon=2),
    ours("`edpo_epsilon: true`", r"`edpo_epsilon: true`.*number", edpo_epsilon=True),
    ours(
        "`edpo_beta_mean: median`",
        r"`edpo_beta_mean: median`.*'arithmetic' or 'harmonic'",
        edpo_beta_mean="median",
    ),
    ours("`beta: -0.1`", r"`beta: -0.1`.*greater than 0", beta=-0.1),
    ours(
        "`learning_rate: fast`",
        r"`learning_rate: fast`.*valid number",
        learning_rate="fast",
    ),
    ours(
        "`learning_rate: -0.001`",
        r"`learning_rate: -0.001`.*greater than or equal to 0",
        learning_rate=-1e-3,
    ),
    ours(
        "`num_epochs: -1`",
        r"`num_epochs: -1`.*greater than 0",
        note="axolotl trains nothing, and saves it",
        num_epochs=-1,
    ),
    ours(
        "`micro_batch_size: 0`",
        r"`micro_batch_size: 0`.*greater than 0",
        micro_batch_size=0,
    ),
    ours(
        "`gradient_accumulation_steps: 0`",
        r"`gradient_accumulation_steps: 0`.*greater than 0",
        gradient_accumulation_steps=0,
    ),
    ours("`sequence_len: 0`", r"`sequence_len: 0`.*greater than 0", sequence_len=0),
    ours(
        "`sequence_len: long`",
        r"`sequence_len: long`.*valid integer",
        sequence_len="long",
    ),
    ours(
        "`val_set_size: -0.5`",
        r"`val_set_size: -0.5`.*greater than or equal to 0",
        val_set_size=-0.5,
    ),
    ours("`logging_steps: 0`", r"`logging_steps: 0`.*greater than 0", logging_steps=0),
    ours("`save_steps: -1`", r"`save_steps: -1`.*greater than", save_steps=-1),
    ours("`lora_r: -4`", r"`lora_r: -4`.*greater than 0", **{**LORA, "lora_r": -4}),
    ours(
        "`lora_dropout: 2`",
        r"`lora_dropout: 2`.*less than or equal to 1",
        **LORA,
        lora_dropout=2,
    ),
    theirs("`adapter: lorra`", r"Adapter 'lorra' is not built in", adapter="lorra"),
    theirs(
        "`attn_implementation: spda`",
        r"attn_implementation='spda' is not.*'sdpa'",
        attn_implementation="spda",
    ),
    theirs(
        "`chat_template: lama3`",
        r"chat_template(.|\n)*'llama3'(.|\n)*input_value='lama3'",
        chat_template="lama3",
    ),
    theirs(
        "`optimizer: adamww`",
        r"adamww is not.*'adamw_torch'",
        "model",
        optimizer="adamww",
    ),
    theirs(
        "`lr_scheduler: cosin`",
        r"cosin is not.*'cosine'",
        "model",
        lr_scheduler="cosin",
    ),
    # keys that contradict each other, or lack one another
    ours(
        "`beta: 0.1`, `rl_beta: 0.2`",
        r"`beta: 0.1` and `rl_beta: 0.2`.*keep one",
        rl_beta=0.2,
    ),
    ours(
        "`bf16: true`, `fp16: true`",
        r"`fp16: true`.*remove it, or `bf16: true`",
        bf16=True,
        fp16=True,
    ),
    ours(
        "`adapter: lora` without `lora_r`",
        r"`lora_r` is not set.*`lora_r: 16`",
        **{**LORA, "lora_r": None},
    ),
    ours(
        "`adapter: lora` without target layers",
        r"`lora_target_modules` is not set.*`lora_target_linear: true`",
        **{**LORA, "lora_target_linear": None},
    ),
    theirs(
        "`adapter: qlora` without `load_in_4bit`",
        r"load_in_4bit to be True for qlora",
        **{**LORA, "adapter": "qlora"},
    ),
    theirs(
        "`warmup_steps` and `warmup_ratio`",
        r"warmup_steps and warmup_ratio are mutually exclusive",
        warmup_steps=1,
        warmup_ratio=0.1,
    ),
    theirs(
        "`val_set_size` and `test_datasets`",
        r"val_set_size should not be used with test_datasets",
        val_set_size=0.1,
        test_datasets=data("pairs.jsonl"),
    ),
    theirs(
        "`batch_size` and `gradient_accumulation_steps`",
        r"only one of gradient_accumulation_steps or batch_size",
        batch_size=8,
    ),
    theirs(
        "`chat_template: jinja` without `chat_template_jinja`",
        r"chat_template_jinja is required",
        **JINJA,
    ),
    theirs(
        "`lora_target_modules: [q_prj]`",
        r"\{'q_prj'\} not found in the base model",
        "model",
        **{**LORA, "lora_target_linear": None, "lora_target_modules": ["q_prj"]},
    ),
    ours(
        "`unfrozen_parameters` that match nothing",
        r"no weight of the model trains.*`unfrozen_parameters`",
        "model",
        unfrozen_parameters=["modell.*"],
    ),
    ours(
        "`precompute_ref_log_probs` with `trl.sync_ref_model`",
        r"`precompute_ref_log_probs: true`.*remove it, or `trl.sync_ref_model`",
        precompute_ref_log_probs=True,
        trl={"sync_ref_model": True},
    ),
    ours(
        "`precompute_ref_log_probs` with rows in `unfrozen_parameters`",
        r"`precompute_ref_log_probs: true`.*by rounding only",
        note="pairs without these tokens have steps of 0 while the reference is live",
        precompute_ref_log_probs=True,
        unfrozen_parameters=["model.embed_tokens.weight$[5:9]"],
    ),
    ours(
        "`edpo_epsilon` with `edpo_control: fixed`",
        r"`edpo_epsilon: 0.1`.*remove it.*`edpo_control: fixed`",
        edpo_control="fixed",
        edpo_epsilon=0.1,
    ),
    ours(
        "`edpo_margin_keep` without `edpo_control: batch_margin`",
        r"`edpo_margin_keep: 0.8`.*remove it.*`edpo_control: epsilon`",
        edpo_margin_keep=0.8,
    ),
    ours(
        "`edpo_margin_keep` with `sft`",
        r"`edpo_margin_keep: 0.8`.*`sft`",
        edpo_control="batch_margin",
        edpo_epsilon=None,
        edpo_margin_keep=0.8,
        dpo_loss_type=["sigmoid", "sft"],
    ),
    ours(
        "`edpo_log_pairs` with `hub_model_id`",
        r"`edpo_log_pairs: 1`.*`hub_model_id: me/model`.*texts of your pairs",
        edpo_log_pairs=1,
        hub_model_id="me/model",
    ),
    ours(
        "`edpo_log_pairs: 0`",
        r"`edpo_log_pairs: 0`.*greater than 0",
        edpo_log_pairs=0,
    ),
    ours(
        "`edpo_reference_cache` without `precompute_ref_log_probs`",
        r"`edpo_reference_cache: .*cache`.*set `precompute_ref_log_probs: true`",
        edpo_reference_cache="{files}/cache",
    ),
    # files
    ours(
        "`base_model`: no such folder",
        r"`base_model: .*no-model`.*there is no .*config.json",
        base_model="{files}/no-model",
    ),
    ours(
        "`deepspeed`: no such file",
        r"`deepspeed: .*no.json`.*`axolotl fetch deepspeed_configs`",
        deepspeed="{files}/no.json",
    ),
    ours(
        "`chat_template_jinja`: no such file",
        r"`chat_template_jinja: .*no.jinja`.*there is no",
        note="axolotl takes the path for the template, and trains on it",
        chat_template_jinja="{files}/no.jinja",
        **JINJA,
    ),
    ours(
        "`lora_model_dir`: no such folder",
        r"`lora_model_dir: .*no-lora`.*adapter_config.json",
        lora_model_dir="{files}/no-lora",
        **LORA,
    ),
    ours(
        "`resume_from_checkpoint`: no such folder",
        r"`resume_from_checkpoint: .*no-checkpoint`.*remove it to start anew",
        "model",
        resume_from_checkpoint="{files}/no-checkpoint",
    ),
    theirs(
        "`datasets`: no such file",
        r"misconfigured dataset path \(.*no.jsonl\)",
        "data",
        datasets=data("no.jsonl"),
    ),
    # data
    ours(
        "`datasets: pairs.jsonl`",
        r"`datasets: .*pairs.jsonl`: a list of entries `- path:`",
        datasets="{files}/pairs.jsonl",
    ),
    ours(
        "`datasets` without `path`",
        r"`datasets`: .*has no `path:`",
        datasets=[{"ds_type": "json", "type": "chat_template.default"}],
    ),
    ours(
        "an empty file",
        r"`datasets`: `path: .*empty.jsonl` is an empty file",
        datasets=data("empty.jsonl"),
    ),
    theirs(
        "`split: trian`",
        r"Unknown split \"trian\".*'train'",
        "data",
        datasets=data("pairs.jsonl", split="trian"),
    ),
    theirs(
        "`type: chat_template.defualt`",
        r"transform function for type 'chat_template.defualt'",
        "data",
        datasets=data("pairs.jsonl", type="chat_template.defualt"),
    ),
    ours(
        "no column `rejected`",
        r"`datasets`: row 1 of `.*no-rejected.jsonl` .*: `rejected` is absent; the "
        "columns are chosen, prompt: remove",
        "data",
        datasets=data("no-rejected.jsonl"),
    ),
    ours(
        "no column `rejected`, no `type`",
        r"row 1 of `.*no-rejected.jsonl`: `rejected` is absent, not a text; the",
        "data",
        **texts("no-rejected.jsonl"),
    ),
    ours(
        "`field_chosen: good`, no such column",
        r"`datasets`: row 1 of .*: `good` is absent; .* chosen, rejected, .*`field_\*`",
        "data",
        datasets=data("pairs.jsonl", field_chosen="good"),
    ),
    ours(
        "`rejected: null` in a row",
        r"`datasets`: row \d+ of `.*null.jsonl` .*: `rejected` is empty.*remove",
        "data",
        datasets=data("null.jsonl"),
    ),
    ours(
        "an answer without text, no `type`",
        r"`datasets`: row 4 of `.*no-text.jsonl`: `rejected` has no text: remove",
        "data",
        datasets=texts("no-text.jsonl")["datasets"],
    ),
    ours(
        "an answer without text, `type: chat_template.default`",
        r"`datasets`: row \d+ of `.*no-answer.jsonl` .*: `rejected` has no text",
        "data",
        datasets=data("no-answer.jsonl"),
    ),
    works(
        "white space around answers, and a chat template that trims it",
        datasets=data("spaced.jsonl"),
        chat_template="llama3",
        sequence_len=1024,
    ),
    ours(
        "a column `images`",
        r"`datasets`: row 1 of .*: there is a column of images, .*: remove the column",
        "data",
        note="beside a vision-language model it trains from axolotl 0.21 on",
        datasets=data("images.jsonl"),
    ),
    ours(
        "a column `image` in `test_datasets`, no `type`",
        r"`test_datasets`: row 1 of .*: there is a column of images.*remove the column",
        "data",
        **texts("texts.jsonl"),
        test_datasets=texts("image.jsonl")["datasets"],
        eval_steps=1,
    ),
    ours(
        "every pair is longer than `sequence_len`",
        r"`datasets` leaves no pair.*`sequence_len: 8`",
        "data",
        sequence_len=8,
    ),
    ours(
        "a chat template that writes no answers",
        r"train set: 40 of 40 pairs have an answer without tokens.*template",
        "model",
        base_model="{files}/mute",
        **texts("messages.jsonl"),
    ),
    ours(
        "chosen and rejected are the same in all pairs",
        r"train set: chosen and rejected are the same in all 40 pairs",
        "model",
        **texts("all-same.jsonl"),
    ),
    warned(
        "chosen and rejected are the same in some pairs",
        r"train set: .* the same in 3 of 40 pairs.*The first begins '",
        note="they are kept, and teach nothing",
        **texts("some-same.jsonl"),
    ),
    # models
    theirs(
        "an encoder-decoder model (T5)",
        r"T5Config.*AutoModelForCausalLM",
        "model",
        base_model="{files}/t5",
        **texts("texts.jsonl"),
    ),
    ours(
        "a model that is not causal (BERT)",
        r"`base_model` of type bert is not causal",
        "model",
        base_model="{files}/bert",
        **texts("texts.jsonl"),
    ),
    ours(
        "NaN in a weight",
        r"1 of 21 weights hold NaN.*first is model.layers.1.mlp.up_proj.weight",
        "model",
        base_model="{files}/nan",
        **texts("texts.jsonl"),
    ),
    warned(
        "a tokenizer without a pad token",
        r"does not have a pad_token, falling back to eos_token",
        note="padding is masked, so any token does",
        base_model="{files}/no-pad",
        **texts("texts.jsonl"),
    ),
    theirs(
        "a tokenizer without a chat template",
        r"tokenizer's chat_template is null",
        "data",
        base_model="{files}/no-template",
    ),
    # training
    ours(
        "the loss of a pair becomes NaN or infinite",
        r"the loss of 1 of the step's pairs is not finite in step \d .*\(β = 0.0?\d+\)",
        "training",
        note="the last complete checkpoint is named",
        base_model="{files}/inf",
        max_steps=5,
        **texts("texts.jsonl"),
    ),
    ours(
        "a margin becomes NaN or infinite, `edpo_control: batch_margin`",
        r"the margin of 1 of the step's pairs is not finite in step \d ",
        "training",
        base_model="{files}/inf",
        max_steps=5,
        edpo_control="batch_margin",
        edpo_epsilon=None,
        **texts("texts.jsonl"),
    ),
    ours(
        "`learning_rate: 1e30`",
        r"the gradient is not finite in step 2 .*Lower `learning_rate`",
        "training",
        learning_rate=1e30,
    ),
]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path, pairs: list[dict]) -> None:
    """All the data of the cells."""
    without = [{key: row[key] for key in ("prompt", "chosen")} for row in pairs]
    answers = {
        key: [row[key][-1]["content"] for row in pairs]
        for key in ("chosen", "rejected")
    }
    texts = [
        {"prompt": row["prompt"] + "\n", "chosen": chosen, "rejected": rejected}
        for row, chosen, rejected in zip(pairs, *answers.values(), strict=True)
    ]
    silent = {"role": "assistant", "content": ""}
    files = {
        "pairs": pairs,
        "texts": texts,
        "no-rejected": without,
        "null": [{**row, "rejected": None} for row in pairs],
        "no-text": [*texts[:3], {**texts[3], "rejected": ""}, *texts[4:]],
        "no-answer": [
            {**row, "rejected": [silent]} if i in (3, 17) else row
            for i, row in enumerate(pairs)
        ],
        "spaced": [
            {**row, "chosen": [{"role": "assistant", "content": " so \n"}]}
            if i in (3, 17)
            else row
            for i, row in enumerate(pairs)
        ],
        "all-same": [{**row, "rejected": row["chosen"]} for row in texts],
        "some-same": [
            {**row, "rejected": row["chosen"]} if i in (5, 20, 39) else row
            for i, row in enumerate(texts)
        ],
        "messages": [
            {
                "prompt": row["chosen"][:-1],
                "chosen": row["chosen"][-1:],
                "rejected": row["rejected"][-1:],
            }
            for row in pairs
        ],
        "images": [{**row, "images": ["a.png"]} for row in pairs],
        "image": [{**row, "image": "a.png"} for row in texts],
        "empty": [],
    }
    for name, rows in files.items():
        write(folder / f"{name}.jsonl", rows)


def copy_model(model: Path, folder: Path, config: Mapping = (), tokenizer=()) -> Path:
    """A copy with other entries in the JSON files of model and tokenizer."""
    shutil.copytree(model, folder)
    for name, entries in {"config": config, "tokenizer_config": tokenizer}.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(entries)))
    return folder


def set_weight(folder: Path, name: str, row: int, value: float) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name][row] = value
    save_file(weights, path, metadata={"format": "pt"})


def write_models(folder: Path, model: Path) -> None:
    """All the models of the cells."""
    tokenizer = tiny.byte_tokenizer()
    size = dict(vocab_size=len(tokenizer), num_attention_heads=4, intermediate_size=64)
    bert = BertConfig(hidden_size=32, initializer_range=0.5, **size)
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2)
    AutoModelForMaskedLM.from_config(bert).save_pretrained(folder / "bert")
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(folder / "t5")
    for name in ("bert", "t5"):
        tokenizer.save_pretrained(folder / name)
    copy_model(model, folder / "no-pad", {"pad_token_id": None}, {"pad_token": None})
    (copy_model(model, folder / "no-template") / "chat_template.jinja").unlink()
    mute = copy_model(model, folder / "mute") / "chat_template.jinja"
    mute.write_text("{{ messages[0]['content'] }}")
    broken = copy_model(model, folder / "nan")
    set_weight(broken, "model.layers.1.mlp.up_proj.weight", 3, float("nan"))
    # the embedding of a letter that is in one answer
    letter = tokenizer.convert_tokens_to_ids("Z")
    broken = copy_model(model, folder / "inf")
    set_weight(broken, "model.embed_tokens.weight", letter, float("inf"))


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    pairs = [json.loads(line) for line in parts["pairs"].read_text().splitlines()]
    pairs[30]["chosen"][-1]["content"] += " Z"
    write_data(folder, pairs)
    write_models(folder, parts["model"])
    return folder


def placed(value, folder: Path):
    """A value of a recipe with the fixture's folder in it."""
    if isinstance(value, str):
        return value.replace("{files}", str(folder))
    if isinstance(value, Mapping):
        return {key: placed(entry, folder) for key, entry in value.items()}
    return [placed(v, folder) for v in value] if isinstance(value, list) else value


@pytest.fixture
def old_run(tmp_path):
    """An `output_dir` with a complete checkpoint of an earlier run."""
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    return checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(reached: list[str], folder: Path, keys: dict):
    """`tiny.train`, saying where it is."""
    reached.append("config")
    cfg = tiny.load_config(folder, keys)
    reached.append("data")
    meta = tiny.load_data(cfg)
    reached.append("model")
    return tiny.train_on(cfg, meta)


@matrix.cells(CELLS)
def test_a_wrong_recipe_says_what_is_wrong(
    cell, recipe, files, tmp_path, old_run, caplog
):
    keys = {"dataset_num_proc": 0, "max_steps": 2, **placed(cell.keys, files)}
    keys = recipe(**keys)
    before, reached, start = contents(old_run), [], time.monotonic()
    if cell.refused:
        with pytest.raises(Exception, match=cell.refused) as caught:
            run(reached, tmp_path, keys)
        assert cell.theirs or "\n" not in str(caught.value)
        expected = "model" if cell.stage == "training" else cell.stage
        assert reached[-1] == expected
        assert isinstance(caught.value, Diverged) == (cell.stage == "training")
        assert not list((tmp_path / "out").glob("*.safetensors"))
    else:
        matrix.assert_trains(run(reached, tmp_path, keys))
        warnings = [r for r in caplog.records if r.levelname == "WARNING"]
        ours = [r for r in warnings if r.name.startswith("axolotl_edpo")]
        lines = {r.message for r in (warnings if cell.warned else ours)}
        found = [line for line in lines if re.search(cell.warned, line)]
        assert len(found) == bool(cell.warned), lines
    assert time.monotonic() - start < 30
    assert contents(old_run) == before


def test_a_stop_leaves_the_checkpoint_of_the_step_before_it(recipe, files, tmp_path):
    keys = recipe(
        **placed({"base_model": "{files}/inf", **texts("texts.jsonl")}, files),
        dataset_num_proc=0,
        save_strategy="steps",
        save_steps=1,
        seed=12,  # the pair is not among the first
    )
    with pytest.raises(Diverged) as caught:
        tiny.train(tmp_path, keys)
    (step,) = map(int, re.findall(r"in step (\d+)", str(caught.value)))
    last = last_complete(tmp_path / "out")
    assert step > 1 and last.name == f"checkpoint-{step - 1}"
    assert f"the last complete checkpoint is {last}." in str(caught.value)
    for name, weight in load_file(last / "model.safetensors").items():
        assert weight.isfinite().all() or name == "model.embed_tokens.weight"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_pairs_of_the_step_that_broke_are_in_the_trace(recipe, files, tmp_path):
    keys = placed({"base_model": "{files}/inf", **texts("texts.jsonl")}, files)
    with pytest.raises(Diverged) as caught:
        tiny.train(tmp_path, recipe(**keys, edpo_log_pairs=1, max_steps=5))
    (step,) = map(int, re.findall(r"in step (\d+)", str(caught.value)))
    rows = pandas.read_parquet(tmp_path / "out" / "edpo_pairs")
    (broken,) = rows[~np.isfinite(rows["margin"])].itertuples()
    assert broken.global_step == step
    assert (broken.chosen + broken.rejected).count("Z") == 1


def test_the_command_ends_with_the_message_and_a_status_of_failure(
    recipe, files, tmp_path
):
    keys = recipe(**placed(texts("no-rejected.jsonl"), files))
    tiny.write(tmp_path, keys)
    done = forked(tmp_path, "train", "recipe.yml", "--launcher", "python")
    assert done.returncode != 0
    assert "ValueError: `datasets`: row 1 of " in done.stdout


def rank(number: int, port: int, folder: Path, keys: dict) -> None:
    """Trains, and writes down what it was stopped by."""
    ranks.become(number, 2, port)
    with pytest.raises((Diverged, ValueError)) as caught:
        tiny.train(folder / str(number), keys)
    (folder / str(number) / "message").write_text(str(caught.value))


INF, NAN = ({"base_model": "{files}/" + model} for model in ("inf", "nan"))
MARGINS = {"edpo_control": "batch_margin", "edpo_epsilon": None}
NAN_GRADIENT = {"plugins": ["axolotl_edpo.EDPOPlugin", "helpers.ranks.BrokenGradient"]}


@pytest.mark.parametrize(
    ("engine", "wrong", "message"),
    first(
        [
            ("ddp", INF, "the loss of 1 of the step's pairs is not finite"),
            # the optimizer's step is in the backward
            ("zero2", INF, "the loss of 1 of the step's pairs is not finite"),
            ("ddp", INF | MARGINS, "the margin of 1 of the step's pairs is not finite"),
            ("zero2", NAN_GRADIENT, "the gradient is not finite in step 2"),
            # a rank has half of every weight
            ("zero3", NAN, "1 of 21 weights hold NaN"),
            ("fsdp2", NAN, "1 of 21 weights hold NaN"),
            ("zero3", NAN_GRADIENT, "the gradient is not finite in step 2"),
        ],
        5,
    ),
)
def test_what_one_rank_finds_stops_all(engine, wrong, message, recipe, files, tmp_path):
    config = tmp_path / "zero.json"
    stage = {"stage": 3 if engine == "zero3" else 2}
    config.write_text(json.dumps({**ranks.ZERO, "zero_optimization": stage}))
    engines = {"ddp": {}, "fsdp2": dict(fsdp_version=2, fsdp_config=ranks.FSDP2)}
    keys = recipe(
        **placed({**wrong, **texts("texts.jsonl")}, files),
        **engines.get(engine, {"deepspeed": str(config)}),
        micro_batch_size=2,
        dataset_num_proc=0,
    )
    keys["plugins"] = [*keys["plugins"], "helpers.ranks.CpuRanks"]
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    processes.run(rank, processes.free_port(), tmp_path, keys, count=2)
    one, other = ((tmp_path / str(n) / "message").read_text() for n in range(2))
    assert one == other
    assert message in one
