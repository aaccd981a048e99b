"""Every option of training: memory, optimizer, schedule, saving, stopping, reports.

What axolotl's schema allows is read from the schema: a value that an upgrade adds fails
here until it has a cell.
"""

import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pandas
import pytest
import torch
import wandb
from axolotl.core.trainers.mixins.scheduler import SchedulerMixin
from axolotl.utils.schemas import integrations
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import (
    CANONICAL_ATTN_IMPLS,
    CustomSupportedOptimizers,
)
from axolotl.utils.schemas.training import (
    HyperparametersConfig,
    JaggedLRConfig,
    SelectiveCheckpointingConfig,
)
from helpers import matrix, tiny, vision
from helpers.matrix import Cell
from helpers.tiny import LORA
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SchedulerType
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.training_args import OptimizerNames

from axolotl_edpo import plugin
from axolotl_edpo.config.rules import WITHOUT_EFFECT
from axolotl_edpo.errors import quote
from axolotl_edpo.upstream import default_fsdp_version
from axolotl_edpo.upstream_data import takes_images

TITLE = "Training options"
INTRO = """
Dropout is off in policy and reference, as in TRL's DPO: `lora_dropout` and a model's
`attention_dropout` do nothing. Where axolotl gives an option to supervised training
only and TRL's trainer takes it as well, `rl: edpo` hands it on; where nothing would
take it and weights would be others, it is refused. `rl: dpo` ignores both.
"""

GPU = "a GPU"
ON_GPU = "an H100 ran it (benchmarks/RESULTS.md)."
RATE = 1e-3  # of `tiny.recipe`
BETA = 0.1


@dataclass(frozen=True)
class Optimizer(Cell):
    """An optimizer: its value in a recipe and the class that it makes."""

    value: str = ""
    made: str = ""


@dataclass(frozen=True)
class Schedule(Cell):
    """A schedule: the rates of four steps, as shares of `learning_rate`."""

    value: str = ""
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Followed(Cell):
    """A schedule that follows the evaluation: by what a better one multiplies."""

    value: str = ""
    better: float = 1.0


@dataclass(frozen=True)
class Option(Cell):
    """An option, and what shows that it took effect.

    Attributes:
        shows: Asserts it of what `run` made of the recipe.
        steps: Optimizer steps, unless `keys` say.
    """

    shows: Callable[[Any], None] | None = None
    steps: int = 2


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """16 pairs to train on and 4 to evaluate."""
    folder = tmp_path_factory.mktemp("few")
    return {
        "train": tiny.dataset(tiny.save_pairs(folder / "train.jsonl", 16)),
        "eval": tiny.dataset(tiny.save_pairs(folder / "eval.jsonl", 4, seed=1)),
        "prepared": str(folder / "prepared"),
    }


@pytest.fixture
def recipe(recipe, few):
    """As everywhere, with an epoch of four steps of four pairs."""
    return functools.partial(
        recipe,
        datasets=few["train"],
        dataset_prepared_path=few["prepared"],
        gradient_accumulation_steps=1,
    )


# --- optimizers --------------------------------------------------------------------


def optimizer(value: str, made: str = "", **rest) -> Optimizer:
    keys = {"optimizer": value, **rest.pop("keys", {})}
    name = rest.pop("name", f"`optimizer: {value}`")
    return Optimizer(name, keys, value=value, made=made, **rest)


def all_make(made: str, *values: str) -> list[Optimizer]:
    return [
        optimizer(v, made, note=UNPAGED if v.startswith("paged") else "")
        for v in values
    ]


CUSTOM = {kind.value for kind in CustomSupportedOptimizers}


def lacks(package: str, *values: str) -> list[Optimizer]:
    """Optimizers of a package that axolotl does not install by itself."""
    return [optimizer(v, untested=f"the package {package}") for v in values]


UNPAGED = "Run on a CPU, where bitsandbytes has no pages."
AO = "axolotl takes the name but has no such optimizer; "
OPTIMIZERS = [
    *all_make("AdamW", "adamw_torch", "adamw_torch_fused"),
    *all_make("AdamW", "adamw_8bit", "adamw_bnb_8bit"),
    *all_make("AdamW", "paged_adamw_8bit", "paged_adamw_32bit"),
    optimizer("adamw_torch_4bit", "AdamW4bit"),
    optimizer("adamw_torch_8bit", "AdamW8bit"),
    optimizer("ao_adamw_fp8", "AdamWFp8"),
    *all_make("AdEMAMix", "ademamix", "ademamix_8bit"),
    *all_make("AdEMAMix", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *all_make("Lion", "lion_8bit", "lion_32bit"),
    *all_make("Lion", "paged_lion_8bit", "paged_lion_32bit"),
    *all_make("RMSprop", "rmsprop"),
    *all_make("RMSprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    optimizer("adafactor", "Adafactor"),
    optimizer("adagrad", "Adagrad"),
    optimizer("sgd", "SGD"),
    optimizer("adamc", "AdamC"),
    optimizer("adopt_adamw", "ADOPT", note="Its first step changes nothing."),
    optimizer("muon", "Muon"),
    optimizer("muon_8bit", "Muon8bit", missing=matrix.without("muon_8bit", CUSTOM)),
    optimizer(
        "dion",
        "Dion",
        name="`optimizer: dion` with `dion_lr`, `dion_momentum`",
        keys={"dion_lr": 1e-2, "dion_momentum": 0.95},
        note="axolotl needs both keys.",
    ),
    optimizer("sinkgd", "SinkGD"),
    optimizer("schedule_free_adamw", "AdamWScheduleFree"),
    optimizer("schedule_free_sgd", "SGDScheduleFree"),
    optimizer(
        "schedule_free_radam",
        "RAdamScheduleFree",
        note="Its first steps change nothing.",
    ),
    optimizer(
        "ao_adamw_4bit",
        refused="Unhandled optimizer: ao_adamw_4bit",
        note=AO + "`adamw_torch_4bit` is the same.",
    ),
    optimizer(
        "ao_adamw_8bit",
        refused="Unhandled optimizer: ao_adamw_8bit",
        note=AO + "`adamw_torch_8bit` is the same.",
    ),
    *lacks("galore-torch", "galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *lacks("galore-torch", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
    *lacks("galore-torch", "galore_adafactor_layerwise"),
    *lacks("q-galore-torch", "q_galore_adamw8bit"),
    *lacks("apollo-torch", "apollo_adamw", "apollo_adamw_layerwise"),
    *lacks("lomo-optim", "lomo", "adalomo"),
    *lacks("torch-optimi", "stable_adamw", "optimi_adamw"),
    *lacks("came-pytorch", "came_pytorch"),
    *lacks("flashoptim", "flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw"),
    *lacks("flashoptim", "flash_lion"),
    *lacks("polora", "polora"),
    *lacks("grokadamw", "grokadamw"),
    *lacks("torchdistx", "adamw_anyprecision"),
    optimizer(
        "scao", untested="the package scao", missing=matrix.without("scao", CUSTOM)
    ),
    optimizer("adamw_torch_xla", untested="an XLA device"),
    optimizer("adamw_torch_npu_fused", untested="an Ascend NPU"),
]
ANY_OTHER = Cell(
    "any other `optimizer`",
    {"optimizer": "adamw_torchh"},
    refused="adamw_torchh is not a valid OptimizerNames",
)


@pytest.fixture
def uncompiled():
    """Some optimizers compile their step, which takes longer than it saves here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@matrix.cells([*OPTIMIZERS, ANY_OTHER], lambda cell: cell == OPTIMIZERS[0])
def test_an_optimizer_trains(cell, recipe, tmp_path, uncompiled):
    if cell.refused:
        matrix.assert_cell(cell, tmp_path, recipe(**cell.keys, max_steps=1))
        return
    slow = {"adopt_adamw": 3, "schedule_free_radam": 7}
    steps = slow.get(cell.value, 2)
    trainer = tiny.train(tmp_path, recipe(**cell.keys, max_steps=steps, num_epochs=2))
    first, *_, last = tiny.logs(trainer)
    assert first["kl/policy_ref"] == first["kl/p_epsilon_steps"] == 0.0
    assert last["kl/policy_ref"] > 0
    assert trainer.controller.beta != BETA
    made = trainer.optimizer.optimizer
    assert type(made).__name__ == cell.made
    if type(made).__module__.startswith("bitsandbytes"):
        assert made.args.optim_bits == (8 if "8bit" in cell.value else 32)
        assert made.is_paged == cell.value.startswith("paged")


def test_every_optimizer_of_the_schema_has_a_cell():
    allowed = {*CUSTOM, *(kind.value for kind in OptimizerNames)}
    assert {cell.value for cell in OPTIMIZERS if not cell.missing} == allowed


# --- schedules ---------------------------------------------------------------------


def schedule(value: str, *rates: float, **keys) -> Schedule:
    more = ", ".join(f"`{k}`" for k in keys if k != "lr_scheduler_kwargs")
    name = f"`lr_scheduler: {value}`" + (f" with {more}" if more else "")
    return Schedule(name, {"lr_scheduler": value, **keys}, value=value, rates=rates)


def half_cosine(lowest: float, *progress: float) -> tuple[float, ...]:
    """From 1 to the lowest share."""
    return tuple(
        lowest + (1 - lowest) * (1 + math.cos(math.pi * p)) / 2 for p in progress
    )


QUARTERS = (0, 0.25, 0.5, 0.75)
SCHEDULES = [
    schedule("constant", 1, 1, 1, 1),
    schedule("constant_with_warmup", 0, 0.5, 1, 1, warmup_steps=2),
    schedule("linear", 0, 0.5, 1, 0.5, warmup_ratio=0.5),
    schedule("cosine", *half_cosine(0, *QUARTERS)),
    schedule(
        "cosine_with_restarts",
        *half_cosine(0, 0, 0.5, 0, 0.5),
        lr_scheduler_kwargs={"num_cycles": 2},
    ),
    schedule(
        "cosine_with_min_lr",
        *half_cosine(0.1, *QUARTERS),
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
    ),
    schedule(
        "cosine_warmup_with_min_lr",  # a step ahead of the others
        *half_cosine(0.1, 0.25, 0.5, 0.75, 1),
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
    ),
    schedule(
        "polynomial",
        *((1 - p) ** 2 for p in QUARTERS),
        lr_scheduler_kwargs={"power": 2.0},
    ),
    schedule("inverse_sqrt", 0, 0.5, 1, math.sqrt(2 / 3), warmup_steps=2),
    schedule(
        "warmup_stable_decay",
        *(1, 1, 1, 0.5),
        lr_scheduler_kwargs={"num_decay_steps": 2},
    ),
    schedule("one_cycle", *half_cosine(0, 0.25, 0.5, 0.75, 1)),
    schedule("rex", *((1 - p) / (0.1 + 0.9 * (1 - p)) for p in (0.25, 0.5, 0.75, 1))),
    schedule("cosine", *half_cosine(0.1, *QUARTERS), cosine_min_lr_ratio=0.1),
    schedule(
        "cosine",
        *half_cosine(0.1, 0, 0.5, 1, 1),
        cosine_min_lr_ratio=0.1,
        cosine_constant_lr_ratio=0.5,
    ),
    schedule("cosine", 0, 0.25, 1, 0.5, lr_quadratic_warmup=True, warmup_steps=2),
    schedule(
        "constant",  # a step ahead
        *(1, 0.001, 1, 0.001),
        jagged_restart_steps=2,
        jagged_restart_warmup_steps=1,
        jagged_restart_anneal_steps=1,
    ),
]
AT_ONCE = {"patience": 0, "factor": 0.5, "min_lr": 1e-6}
FOLLOWED = [
    Followed(
        "`lr_scheduler: reduce_lr_on_plateau`",
        {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_kwargs": AT_ONCE},
        value="reduce_lr_on_plateau",
        note="With `eval_steps`; it follows `eval_loss`, or `metric_for_best_model`.",
    ),
    Followed(
        "`lr_scheduler: greedy`",
        {"lr_scheduler": "greedy", "lr_scheduler_kwargs": AT_ONCE},
        value="greedy",
        better=2.0,
        note="The same. Its `min_lr` is 0.001, unless `lr_scheduler_kwargs` say.",
    ),
]
OTHER_SCHEDULE = Cell(
    "any other `lr_scheduler`",
    {"lr_scheduler": "cosinee"},
    refused="cosinee is not a valid SchedulerType",
)


@matrix.cells([*SCHEDULES, OTHER_SCHEDULE], lambda cell: cell == SCHEDULES[0])
def test_a_schedule_sets_the_rates(cell, recipe, tmp_path):
    keys = recipe(**cell.keys, max_steps=4)
    if cell.refused:
        matrix.assert_cell(cell, tmp_path, keys)
        return
    trainer = tiny.train(tmp_path, keys)
    rates = [entry["learning_rate"] / RATE for entry in tiny.logs(trainer)]
    assert rates == pytest.approx(cell.rates, abs=3e-4)
    assert trainer.controller.beta != BETA


@matrix.cells(FOLLOWED, lambda cell: cell == FOLLOWED[0])
def test_a_schedule_follows_the_evaluation(cell, recipe, few, tmp_path):
    keys = recipe(**cell.keys, max_steps=4, test_datasets=few["eval"], eval_steps=1)
    trainer = tiny.train(tmp_path, keys)
    best, rates = math.inf, [1.0]
    for entry in tiny.logs(trainer, "eval_loss")[1:]:  # the first: before training
        better = entry["eval_loss"] < best
        rates.append(rates[-1] * (cell.better if better else 0.5))
        best = min(best, entry["eval_loss"])
    assert len({*rates}) > 1
    used = [entry["learning_rate"] / RATE for entry in tiny.logs(trainer)]
    assert used == pytest.approx(rates[:-1])


def test_every_schedule_of_the_schema_has_a_cell():
    own = inspect.getsource(SchedulerMixin.create_scheduler)
    alternates = re.findall(r'alternate_lr_scheduler_type == "(\w+)"', own)
    allowed = {*alternates, *(kind.value for kind in SchedulerType)}
    assert {cell.value for cell in (*SCHEDULES, *FOLLOWED)} == allowed


# --- memory ------------------------------------------------------------------------


def checkpointing(name: str, **rest) -> Cell:
    keys = {"gradient_checkpointing": True, **rest.pop("keys", {})}
    return Cell(name, keys, **rest)


def reentrant(value: bool) -> dict:
    return {"gradient_checkpointing_kwargs": {"use_reentrant": value}}


def saving(**keys) -> dict:
    """Keys that checkpoint all but these matrix products."""
    return {"gradient_checkpointing": True, "selective_checkpointing": keys}


@dataclass(frozen=True)
class Selective(Cell):
    """A way to keep results of a layer: of how many matrix products, of seven."""

    saves: int = 0
    missing: str = matrix.without(
        "save_modules", SelectiveCheckpointingConfig.model_fields
    )


OFFLOADED = "TRL's offloading asks which accelerator there is."
DEPRECATED = "axolotl: deprecated, `activation_offloading: {}` is the same."
CHECKPOINTING = [
    checkpointing("`gradient_checkpointing: true`"),
    checkpointing("the same, `use_reentrant: true`", keys=reentrant(True)),
    checkpointing("the same, `use_reentrant: false`", keys=reentrant(False)),
    checkpointing("`gradient_checkpointing: true`, LoRA", keys=LORA),
    checkpointing("the same, LoRA, `use_reentrant: true`", keys=LORA | reentrant(True)),
    checkpointing("`selective_checkpointing`", keys={"selective_checkpointing": True}),
    checkpointing(
        "`selective_checkpointing`, LoRA", keys={"selective_checkpointing": True} | LORA
    ),
]
SELECTIVE = [
    Selective(
        "`selective_checkpointing.save_modules`",
        saving(save_modules=["gate_proj"]),
        saves=1,
    ),
    Selective(
        "`selective_checkpointing.save_matmul_min_k`",
        saving(save_matmul_min_k=32),  # all but the last: of SIZES' matrices
        saves=6,
    ),
]
OFFLOADING = [
    checkpointing(
        "`activation_offloading: true`",
        keys={"activation_offloading": True},
        untested=GPU,
        note=OFFLOADED,
    ),
    *(
        checkpointing(
            f"`activation_offloading: {value}`",
            keys={"activation_offloading": value},
            untested=GPU,
            note="TRL's DPO knows one way only, that of `true`.",
        )
        for value in ("legacy", "disk", "hidden_states")
    ),
    *(
        Cell(
            f"`gradient_checkpointing: {value}`",
            {"gradient_checkpointing": value},
            untested=GPU,
            note=DEPRECATED.format(new),
        )
        for value, new in (("offload", "true"), ("offload_disk", "disk"))
    ),
]


def train_counting(folder: Path, keys: dict) -> tuple[Any, int]:
    """The trainer, and how often a decoder layer ran."""
    forward = LlamaDecoderLayer.forward
    with mock.patch.object(
        LlamaDecoderLayer, "forward", autospec=True, side_effect=forward
    ) as layer:
        return tiny.train(folder, keys), layer.call_count


@pytest.fixture(scope="module")
def plain(parts, few, tmp_path_factory):
    """Two steps without any option: its trainer and layer calls, full or LoRA."""

    @functools.cache
    def run(adapter: str | None) -> tuple[Any, int]:
        folder = tmp_path_factory.mktemp("plain")
        keys = dict(max_steps=2, gradient_accumulation_steps=1, datasets=few["train"])
        keys |= LORA if adapter else {}
        made = tiny.recipe(folder, parts["model"], parts["pairs"], **keys)
        return train_counting(folder, made)

    return run


@matrix.cells(CHECKPOINTING, lambda cell: "the same" not in cell.name)
def test_checkpointing_computes_twice_and_changes_nothing(
    cell, recipe, tmp_path, plain
):
    expected, once = plain(cell.keys.get("adapter"))
    made, calls = train_counting(tmp_path, recipe(**cell.keys, max_steps=2))
    assert calls > once
    matrix.assert_trains(made)
    for a, b in zip(tiny.logs(made), tiny.logs(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["kl/avg_steps"] == b["kl/avg_steps"]


class Products(TorchDispatchMode):
    """Counts the matrix products that are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **kwargs or {})


@matrix.cells(SELECTIVE, lambda cell: cell == SELECTIVE[0])
def test_saved_products_are_not_computed_again(cell, recipe, tmp_path):
    runs = []
    for save in ([], cell.keys["selective_checkpointing"]):
        keys = {**cell.keys, "selective_checkpointing": save or {"save": []}}
        with Products() as products:
            trainer = matrix.assert_cell(cell, tmp_path, recipe(**keys))
        runs.append((products.count, [log["loss"] for log in tiny.logs(trainer)]))
    (all_again, losses), (fewer, same) = runs
    layers, micro_batches = 2, 2
    assert all_again - fewer == cell.saves * layers * micro_batches
    assert same == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_offloading"])
def test_every_way_to_save_activations_has_a_cell(key):
    literal, *_ = get_args(AxolotlInputConfig.model_fields[key].annotation)
    tested = {cell.keys.get(key) for cell in (*CHECKPOINTING, *OFFLOADING)}
    assert {*get_args(literal), True} <= tested


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_attention_dropout_of_a_model_is_off(recipe, tmp_path, plain, adapter):
    """TRL's `disable_dropout` finds modules; attention's dropout is a number."""
    noisy = tiny.save_model(tmp_path / "model", attention_dropout=0.3)
    quiet = tiny.train(tmp_path, recipe(**adapter, max_steps=2, base_model=str(noisy)))
    expected, _ = plain(adapter.get("adapter"))
    for a, b in zip(tiny.logs(quiet), tiny.logs(expected), strict=True):
        assert a["loss"] == b["loss"]


NO_CONTEXT = matrix.without_module("axolotl.integrations.context_parallel")

# --- precision, attention, compiler --------------------------------------------------

REGIONAL = {"torch_compile": True, "torch_compile_regional": True}
NO_REGIONAL = matrix.without("torch_compile_regional")
COMPUTING = [
    Cell("`bf16: true`", {"bf16": True}),
    Cell("`bf16: false`", {"bf16": False}),
    Cell(
        "`bf16: auto`, `fp16`, `float16`",
        {"bf16": "auto"},
        untested=GPU,
        note=f"`fp16`: {ON_GPU}",
    ),
    Cell("`tf32: true`", {"tf32": True}, untested="an Ampere GPU"),
    Cell("`fp8: true`", {"fp8": True}, untested="a Hopper GPU"),
    Cell("`attn_implementation: sdpa`", {"attn_implementation": "sdpa"}),
    Cell("`attn_implementation: eager`", {"attn_implementation": "eager"}),
    *(
        Cell(
            f"`attn_implementation: {value}`",
            {"attn_implementation": value},
            untested=GPU,
            note=note,
        )
        for value, note in {
            "flash_attention_2": ON_GPU,
            "flash_attention_3": "",
            "flash_attention_4": "",
            "flex_attention": "It has no backward on a CPU.",
            "xformers": "axolotl's own patch for Llama fails with transformers 5.",
            "sage": "",
            "fp8": "",
        }.items()
    ),
    Cell(
        "`attn_implementation: flash_attention_torch`",
        {"attn_implementation": "flash_attention_torch"},
        refused="requires a transformers release that registers",
        note="axolotl: the transformers that it pins does not have it.",
    ),
    Cell(
        "`attn_implementation: varlen`",
        {"attn_implementation": "varlen"},
        refused="varlen is supported only for native",
        note="axolotl: for diffusion models.",
        missing=matrix.without("varlen", CANONICAL_ATTN_IMPLS),
    ),
    Cell(
        "`torch_compile: true`",
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        note="Layer by layer. Run with `torch_compile_backend: aot_eager`.",
    ),
    Cell(
        "`torch_compile_regional: true`",
        {**REGIONAL, "torch_compile_backend": "aot_eager"},
        note="The same: each layer is compiled with or without it.",
        missing=NO_REGIONAL,
    ),
    Cell(
        "`torch_compile_regional: true`, `gradient_checkpointing: true`",
        {**REGIONAL, "gradient_checkpointing": True},
        refused="torch_compile_regional cannot be combined with gradient_checkpoint",
        note="axolotl's message.",
        missing=NO_REGIONAL,
    ),
]


@matrix.cells(COMPUTING, lambda cell: "torch_compile" not in cell.keys)
def test_it_computes_so(cell, recipe, tmp_path):
    trainer = matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))
    if trainer is None:
        return
    lm = trainer.model
    if "bf16" in cell.keys:
        bf16 = cell.keys["bf16"]
        weight = lm.model.layers[0].mlp.up_proj.weight
        assert weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert trainer.args.bf16 == bf16
    if wanted := cell.keys.get("attn_implementation"):
        assert lm.config._attn_implementation == wanted
    compiled = {m for m in lm.modules() if m._compiled_call_impl is not None}
    assert compiled == ({*lm.model.layers} if "torch_compile" in cell.keys else set())


def test_every_attention_of_the_schema_has_a_cell():
    here = [cell.keys for cell in COMPUTING if not cell.missing]
    tested = {keys.get("attn_implementation") for keys in here} - {None}
    assert tested == set(CANONICAL_ATTN_IMPLS)


# --- one option each -----------------------------------------------------------------


def checkpoints(run: Any) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in run.out.glob("checkpoint-*"))


def saved_state(run: Any, step: int) -> dict:
    return json.loads((run.out / f"checkpoint-{step}/trainer_state.json").read_text())


def saved_beta(run: Any, step: int) -> float:
    return saved_state(run, step)["stateful_callbacks"]["EDPO"]["beta"]


def weights(folder: Path) -> dict:
    """Of an adapter, if there is one."""
    return load_file(min(folder.glob("*model.safetensors")))


def rates(run: Any) -> set[float]:
    groups = run.trainer.optimizer.param_groups
    return {group["lr"] for group in groups if group["params"]}


def shows_adam(run: Any) -> None:
    group = run.trainer.optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    decays = {group["weight_decay"] for group in run.trainer.optimizer.param_groups}
    assert decays == {0.1, 0.0}  # none on norms
    assert run.trainer.args.max_grad_norm == 0.01


def shows_checkpoints(*steps: int, only_model: bool = False) -> Callable[[Any], None]:
    def shows(run: Any) -> None:
        assert checkpoints(run) == [*steps]
        for step in steps:
            folder = run.out / f"checkpoint-{step}"
            assert (folder / "optimizer.pt").exists() != only_model
            used = {e["step"]: e["kl/beta"] for e in tiny.logs(run.trainer)}
            after = used.get(step + 1, run.trainer.controller.beta)
            assert saved_beta(run, step) == after

    return shows


def shows_evaluations(*steps: int) -> Callable[[Any], None]:
    def shows(run: Any) -> None:
        assert [e["step"] for e in tiny.logs(run.trainer, "eval_kl/beta")] == [*steps]

    return shows


def shows_best(metric: str, greater: bool) -> Callable[[Any], None]:
    def shows(run: Any) -> None:
        found = {e["step"]: e[metric] for e in tiny.logs(run.trainer, metric)}
        steps = [step for step in found if step]
        choose = max if greater else min
        best = choose(steps, key=found.__getitem__)  # the first of equals
        assert run.trainer.state.best_model_checkpoint.endswith(f"-{best}")
        assert run.trainer.state.best_metric == found[best]
        assert best != run.trainer.state.global_step
        a, b = weights(run.out), weights(run.out / f"checkpoint-{best}")
        assert all(torch.equal(a[name], b[name]) for name in b)

    return shows


def shows_early_stop(run: Any) -> None:
    losses = [e["eval_loss"] for e in tiny.logs(run.trainer, "eval_loss")][1:]
    last = run.trainer.state.global_step
    assert last == len(losses) < 8
    assert min(losses[-2:]) > min(losses)  # two evaluations without a better one
    assert saved_beta(run, last) == run.trainer.controller.beta != BETA


def shows_logs(run: Any) -> None:
    assert [e["step"] for e in tiny.logs(run.trainer)] == [1, 2, 4]
    assert tiny.logs(run.trainer)[-1]["kl/avg_steps"] * 8 % 1 == 0  # of two steps


def shows_order(run: Any) -> None:
    sampler = run.trainer._get_train_sampler()
    assert [*sampler] == [*range(16)]


def shows_counts(run: Any) -> None:
    seen = run.trainer.state.num_input_tokens_seen
    assert seen >= run.trainer.records.metrics.tokens > 0


def shows_card(run: Any) -> None:
    card = (run.out / "README.md").read_text()
    assert "trained with ε-DPO" in card and "papers/2502.13177" in card
    assert "@article{lee2025edpo," in card
    header = card.split("---")[1]
    assert "- edpo" in header and "- dpo" in header


def shows_tensorboard(run: Any) -> None:
    events = EventAccumulator(str(next(run.out.rglob("events.out*")).parent)).Reload()
    logged = [event.value for event in events.Scalars("train/kl/beta")]
    used = [entry["kl/beta"] for entry in tiny.logs(run.trainer)]
    assert logged == pytest.approx(used, rel=1e-6)


def shows_wandb(run: Any) -> None:
    wandb.finish()
    wandb.teardown()  # as the end of a process does; only then all is written
    (file,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/kl/beta" in content and b"train/kl/policy_ref" in content


def takes_buckets() -> bool:
    """Whether the installed trackio takes all that transformers hands over."""
    spec = importlib.util.find_spec("trackio")
    return spec is not None and "bucket_id" in Path(spec.origin).read_text()


def shows_collection(run: Any) -> None:
    assert run.collections >= 3  # one per step, one at the end


def shows_cache(folder: str, head: bool) -> Callable[[Any], None]:
    def shows(run: Any) -> None:
        trainer = run.trainer
        assert (
            trainer.reference.cache.folder.parent.name == folder
            and trainer.reference.cache.names()
        )
        assert (
            trainer.ref_model is None
            and (trainer.reference.kept_head is not None) == head
        )

    return shows


def shows_trigger(run: Any) -> None:
    assert checkpoints(run) == [1]
    assert not (run.out / "axolotl_checkpoint.save").exists()


BEST = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "eval": 1}
OPTIONS = [
    Option(
        "`weight_decay`, `max_grad_norm`, `adam_beta1`, `adam_beta2`, `adam_epsilon`",
        dict(
            weight_decay=0.1,
            max_grad_norm=0.01,
            adam_beta1=0.8,
            adam_beta2=0.95,
            adam_epsilon=1e-6,
        ),
        shows=shows_adam,
    ),
    Option(
        "`optim_args`",
        {"optimizer": "rmsprop", "optim_args": {"momentum": 0.5}},
        shows=lambda run: assert_equal(
            run.trainer.optimizer.param_groups[0]["momentum"], 0.5
        ),
    ),
    Option(
        "`lr_groups`",
        {"lr_groups": [{"name": "q", "modules": ["q_proj"], "lr": 0.01}]},
        shows=lambda run: assert_equal(rates(run), {RATE, 0.01}),
    ),
    Option(
        "`embedding_lr`",
        {"embedding_lr": 1e-4},
        shows=lambda run: assert_equal(rates(run), {RATE, 1e-4}),
    ),
    Option(
        "`embedding_lr_scale`",
        {"embedding_lr_scale": 0.5},
        shows=lambda run: assert_equal(rates(run), {RATE, RATE / 2}),
    ),
    Option(
        "`loraplus_lr_ratio`",
        {**LORA, "loraplus_lr_ratio": 4.0},
        shows=lambda run: assert_equal(rates(run), {RATE, 4 * RATE}),
    ),
    Option(
        "`max_steps`; `logging_steps`",
        {"max_steps": 4, "logging_steps": 2},
        shows=shows_logs,
        note="The first step is logged as well.",
    ),
    Option(
        "`num_epochs`",
        {"num_epochs": 0.5, "max_steps": None},
        shows=lambda run: assert_equal(run.trainer.state.global_step, 2),
    ),
    Option(
        "`save_strategy: epoch`",
        {"save_strategy": "epoch", "num_epochs": 1, "max_steps": None},
        shows=shows_checkpoints(4),
    ),
    Option(
        "`save_strategy: steps`, `save_steps`, `save_total_limit`",
        {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
        shows=shows_checkpoints(2, 3),
        steps=3,
    ),
    Option(
        "`saves_per_epoch`",
        {"saves_per_epoch": 2, "save_strategy": None, "max_steps": None},
        shows=shows_checkpoints(2, 4),
    ),
    Option("`save_strategy: no`", {"save_strategy": "no"}, shows=shows_checkpoints()),
    Option(
        "`save_first_step`, `save_only_model`",
        {"save_first_step": True, "save_only_model": True},
        shows=shows_checkpoints(1, only_model=True),
    ),
    Option(
        "`save_strategy: best`, `metric_for_best_model: eval_loss`",
        {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval": 1},
        shows=lambda run: assert_equal(
            checkpoints(run)[-1], run.trainer.state.best_global_step
        ),
        note="axolotl forgets `metric_for_best_model` in `rl: dpo`.",
    ),
    Option(
        "`load_best_model_at_end`, `metric_for_best_model: eval_loss`",
        {
            **BEST,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        },
        shows=shows_best("eval_loss", greater=False),
        note="`rl: dpo` ignores both.",
    ),
    Option(
        "the same, `eval_rewards/accuracies`, `greater_is_better`, LoRA",
        {
            **BEST,
            **LORA,
            "learning_rate": 3e-2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_rewards/accuracies",
            "greater_is_better": True,
        },
        shows=shows_best("eval_rewards/accuracies", greater=True),
        note="The same.",
    ),
    Option(
        "`early_stopping_patience`",
        {**BEST, "early_stopping_patience": 2, "max_steps": 8, "num_epochs": 2},
        shows=shows_early_stop,
        note="Loads the best model at the end. `rl: dpo` ignores it.",
    ),
    Option(
        "`loss_watchdog_threshold`, `loss_watchdog_patience`",
        dict(loss_watchdog_threshold=0.1, loss_watchdog_patience=2, max_steps=5),
        shows=lambda run: assert_equal(run.trainer.state.global_step, 3),
        note="`rl: dpo` ignores them.",
    ),
    Option("`eval_steps`", {"eval": 1}, shows=shows_evaluations(0, 1, 2)),
    Option(
        "`eval_on_start: false`",
        {"eval": 1, "eval_on_start": False},
        shows=shows_evaluations(1, 2),
        missing=matrix.without("eval_on_start"),
    ),
    Option(
        "`eval_strategy: epoch`",
        {"eval": None, "eval_strategy": "epoch", "max_steps": None},
        shows=shows_evaluations(0, 4),
        note="axolotl evaluates before the first step as well.",
    ),
    Option(
        "`evals_per_epoch`",
        {"eval": None, "evals_per_epoch": 2, "max_steps": None},
        shows=shows_evaluations(0, 2, 4),
    ),
    Option(
        "`val_set_size`",
        {"val_set_size": 0.25, "eval_steps": 1},
        shows=lambda run: assert_equal(len(run.trainer.eval_dataset), 4),
    ),
    Option(
        "`curriculum_sampling`",
        {"curriculum_sampling": True},
        shows=shows_order,
        note="`rl: dpo` shuffles nevertheless.",
    ),
    Option(
        "`unfrozen_parameters`",
        {"unfrozen_parameters": ["lm_head"]},
        shows=lambda run: assert_equal(
            [n for n, p in run.trainer.model.named_parameters() if p.requires_grad],
            ["lm_head.weight"],
        ),
    ),
    Option(
        "`include_tokens_per_second`",
        {"include_tokens_per_second": True},
        shows=shows_counts,
    ),
    Option(
        "`logging_nan_inf_filter: false`",
        {"logging_nan_inf_filter": False},
        shows=lambda run: assert_equal(run.trainer.args.logging_nan_inf_filter, False),
        note="A loss that is not finite stops the run, with it or without.",
        missing=matrix.without("logging_nan_inf_filter"),
    ),
    Option(
        "`gc_collect_steps` (`gc_steps`), `torch_empty_cache_steps`",
        {"gc_collect_steps": 1, "torch_empty_cache_steps": 1},
        shows=shows_collection,
    ),
    Option(
        "`dynamic_checkpoint`",
        {"dynamic_checkpoint": {"enabled": True, "check_interval": 1}},
        shows=shows_trigger,
    ),
    Option(
        "`precompute_ref_log_probs`",
        {"precompute_ref_log_probs": True},
        shows=shows_cache("edpo_reference", head=True),
        note="The reference's hidden states are kept, and its model is not; with "
        "`edpo_control: fixed` or `batch_margin`, two numbers per pair. Not with "
        "`trl.sync_ref_model`.",
    ),
    Option(
        "`precompute_ref_log_probs`, `edpo_reference_cache`, LoRA",
        {**LORA, "precompute_ref_log_probs": True, "edpo_reference_cache": "cache"},
        shows=shows_cache("cache", head=False),
    ),
    Option("model card", shows=shows_card),
    Option("`use_tensorboard`", {"use_tensorboard": True}, shows=shows_tensorboard),
    Option(
        "`use_wandb`",
        {"use_wandb": True, "wandb_mode": "offline", "wandb_project": "p"},
        shows=shows_wandb,
        note="Run offline.",
    ),
]
OUTSIDE = [
    Cell(
        "`use_trackio`",
        {"use_trackio": True},
        untested="a process of its own" if takes_buckets() else "a newer trackio",
        note="With the one that axolotl pins till 0.20, transformers stops, also in "
        "`rl: dpo`.",
    ),
    Cell("`use_mlflow`", {"use_mlflow": True}, untested="the package mlflow"),
    Cell("`use_comet`", {"use_comet": True}, untested="the package comet-ml"),
    Cell(
        "`use_otel_metrics`",
        {"use_otel_metrics": True},
        untested="axolotl's extra `opentelemetry`",
        note="Without it axolotl goes on without a word.",
    ),
    Cell("`hub_model_id`", {"hub_model_id": "a/b"}, untested="a hub to push to"),
    Cell(
        "`profiler_steps`",
        {"profiler_steps": 1},
        untested=GPU,
        note="axolotl's profiler records CUDA's memory.",
    ),
    Cell(
        "`sync_profiler_steps`, `sync_profiler_start_step`",
        {"sync_profiler_steps": 1, "sync_profiler_start_step": 1},
        untested=GPU,
        note="Without one axolotl warns and counts nothing.",
        missing=matrix.without("sync_profiler_steps"),
    ),
    Cell(
        "`coreweave` (its plugin)",
        untested="an account at CoreWeave",
        missing=matrix.without_module("axolotl.integrations.coreweave"),
    ),
    Cell(
        "`autotune_*` (the plugin of kernels)",
        untested=GPU,
        missing=matrix.without_module("axolotl.integrations.kernels.autotune_cache"),
    ),
]


def assert_equal(a: Any, b: Any) -> None:
    assert a == b


@pytest.fixture
def run(recipe, few, tmp_path, monkeypatch):
    """Trains an option's recipe; `eval: N` is an evaluation set, every N steps."""
    collections = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *a: collections.append(1) or collect(*a))

    def start(option: Option) -> Any:
        keys = {"max_steps": option.steps, **option.keys}
        if "eval" in keys:
            keys |= {"test_datasets": few["eval"], "eval_steps": keys.pop("eval")}
        if "edpo_reference_cache" in keys:
            keys["edpo_reference_cache"] = str(tmp_path / keys["edpo_reference_cache"])
        out = tmp_path / "out"
        if "dynamic_checkpoint" in keys:
            out.mkdir()
            (out / "axolotl_checkpoint.save").touch()
        os.environ["WANDB_DIR"] = str(tmp_path)
        trainer = tiny.train(tmp_path, recipe(**keys))
        return SimpleNamespace(
            trainer=trainer, out=out, folder=tmp_path, collections=len(collections)
        )

    return start


# Options that axolotl and transformers handle alone, and the keys of trackers.
NOT_OURS = (
    "`use_",
    "`evals_per_epoch",
    "`eval_strategy: epoch",
    "`saves_per_epoch",
    "`save_strategy: epoch",
    "`save_strategy: no",
    "the same, `eval_rewards/accuracies",
    "`include_tokens_per_second",
    "`num_epochs",
    "`optim_args",
    "`lr_groups",
    "`embedding_lr_scale",
)


@matrix.cells(OPTIONS, lambda cell: not cell.name.startswith(NOT_OURS))
def test_an_option_takes_effect(cell, run):
    made = run(cell)
    first = tiny.logs(made.trainer)[0]
    assert first["kl/policy_ref"] == first["kl/p_epsilon_steps"] == 0.0
    assert made.trainer.controller.beta != BETA
    cell.shows(made)


def control(kind: str, name: str = "", note: str = "", **keys) -> Cell:
    keys |= {"edpo_control": kind, "edpo_epsilon": None}
    return Cell(f"`edpo_control: {kind}`{name}", keys, note=note)


CONTROLS = [
    control("fixed", note="DPO with this head, rows and references."),
    control("fixed", ", LoRA", **LORA),
    control("fixed", ", QLoRA", **tiny.NF4),
    control("batch_margin", note="β-DPO; a batch is a step, on all ranks."),
    control("batch_margin", ", LoRA", **LORA),
    control("batch_margin", ", QLoRA", **tiny.NF4),
    control("batch_margin", " with `edpo_margin_keep`", edpo_margin_keep=0.5),
    control("batch_margin", ", `sample_packing`", sample_packing=True),
    control("batch_margin", ", `dpo_loss_type: [ipo]`", dpo_loss_type=["ipo"]),
]


@matrix.cells(CONTROLS, lambda cell: "adapter" not in cell.keys)
def test_a_control_moves_beta_or_does_not(cell, recipe, tmp_path):
    model = str(tiny.save_model(tmp_path / "wide", hidden_size=64))
    keys = recipe(**{"base_model": model, **cell.keys})
    trainer = tiny.train(tmp_path, {**keys, "max_steps": 3})
    first, second, third = tiny.logs(trainer)
    assert first["kl/beta"] == BETA and first["kl/policy_ref"] == 0
    assert min(second["kl/policy_ref"], third["kl/policy_ref"]) > 0
    moves = cell.keys["edpo_control"] == "batch_margin"
    assert (second["kl/beta"] != BETA) == (third["kl/beta"] != BETA) == moves


MAX_KL = Cell(
    "`edpo_max_kl`",
    {"edpo_max_kl": 1e-6},
    note="Stops beyond this KL per token, with a checkpoint.",
)


@matrix.cells([MAX_KL])
def test_a_run_stops_at_its_second_step_beyond_the_bound_of_kl(cell, recipe, tmp_path):
    matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


TRACE = Cell(
    "`edpo_log_pairs`",
    {"edpo_log_pairs": 2},
    note="Parquet files in `edpo_pairs` in `output_dir`.",
)


@matrix.cells([TRACE])
def test_pairs_of_every_second_step_are_noted(cell, recipe, tmp_path):
    matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))
    rows = pandas.read_parquet(tmp_path / "out" / "edpo_pairs")
    assert rows["global_step"].tolist() == [2] * 4 and rows["id"].nunique() == 4


SEED = Cell("`seed`", {"seed": 8})
DETERMINED = Cell(
    "`full_determinism`",
    {"full_determinism": True},
    missing=matrix.without("full_determinism"),
)
RESUME = Cell(
    "`auto_resume_from_checkpoints`, `resume_from_checkpoint`",
    {"auto_resume_from_checkpoints": True},
    note="β goes on, as do optimizer and schedule.",
)


@matrix.cells([SEED])
def test_a_seed_gives_the_same_run_again_and_another_another(cell, recipe, tmp_path):
    def losses(**keys) -> list[float]:
        trainer = matrix.assert_cell(cell, tmp_path, recipe(**keys))
        return [entry["loss"] for entry in tiny.logs(trainer)]

    assert losses(**cell.keys) == losses(**cell.keys) != losses()


@pytest.fixture
def undetermined():
    """As before, whatever a run has asked of torch."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@matrix.cells([DETERMINED])
def test_algorithms_are_deterministic(cell, recipe, tmp_path, undetermined):
    trainer = matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert trainer.args.full_determinism


# What `rl: edpo` does without, and what is for another command.
UNUSED = [
    Cell(
        "`fa_varlen_kwargs_in_collator: false`",
        {"fa_varlen_kwargs_in_collator": False},
        note="Of supervised batches; rows of pairs carry their own bounds.",
        missing=matrix.without("fa_varlen_kwargs_in_collator"),
    ),
    Cell(
        "`export`",
        {"export": {"format": "gguf"}},
        note="Of `axolotl export`.",
        missing=matrix.without("export"),
    ),
    Cell(
        "`context_parallel: {size: 1}`",
        {"context_parallel": {"size": 1, "backend": "ulysses"}},
        missing=NO_CONTEXT,
    ),
]


@matrix.cells(UNUSED)
def test_it_changes_nothing(cell, recipe, tmp_path, plain):
    expected, _ = plain(None)
    made = matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))
    assert [e["loss"] for e in tiny.logs(made)] == [
        e["loss"] for e in tiny.logs(expected)
    ]


@matrix.cells([RESUME])
def test_a_run_goes_on_by_itself(cell, recipe, tmp_path):
    keys = recipe(**cell.keys, save_strategy="steps", save_steps=2)
    first = matrix.assert_cell(cell, tmp_path, keys)
    after = tiny.train(tmp_path, {**keys, "max_steps": 3})
    assert [e["step"] for e in tiny.logs(after)] == [1, 2, 3]
    assert tiny.logs(after)[-1]["kl/beta"] == first.controller.beta


# --- refused -------------------------------------------------------------------------

NOISE = "Its noise in the policy alone would decide β; `rl: dpo` ignores it."
IGNORED = "`rl: dpo` ignores it."
AXOLOTL = "axolotl does so beside any `rl`."
DIVIDED = (
    "GPUs divide packed rows, from axolotl 0.20 on: "
    "`tests/engines/test_context_parallel.py` runs them."
)


def ignores_losses() -> bool:
    """Whether a loss of supervised training is taken beside `rl`; till 0.19."""
    return not hasattr(AxolotlInputConfig, "check_custom_loss_conflicts")


def refused(
    key: str,
    value: Any,
    note: str = IGNORED,
    name: str = "",
    missing: str = "",
    **keys,
) -> Cell:
    message = f"{quote(key, value)} does not work with `rl: edpo`: "
    message = re.escape(message) + "(remove it|set `|use a text model)"
    keys[key] = value
    return Cell(name or f"`{key}`", keys, message, note=note, missing=missing)


FSDP = Cell(
    "`fsdp_config` without `fsdp_version`",
    {"fsdp_config": {"reshard_after_forward": True}},
    "`fsdp_version: 1`.*set `fsdp_version: 2`" if default_fsdp_version() == 1 else "",
    note="In axolotl 0.19 it is FSDP 1, which flattens the head that is read, and then "
    "FSDP2.",
)


@matrix.cells([FSDP])
def test_fsdp_is_its_second_version(cell, recipe, tmp_path):
    if cell.refused:
        matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))
        return
    cfg = tiny.load_config(tmp_path, recipe(**cell.keys))
    assert cfg.fsdp_version == cfg.fsdp_config.fsdp_version == 2


IMAGES = Cell(
    "`processor_type`, `is_multimodal`, and a column `images`",
    {"processor_type": "AutoProcessor", "is_multimodal": True},
    "" if takes_images() else "`is_multimodal: true`.* install axolotl 0.21 or later",
    note="From axolotl 0.21 on, which takes images in `rl: dpo`; rows are padded.",
)


@matrix.cells([IMAGES])
def test_pairs_with_images_train(cell, recipe, tmp_path):
    file = vision.save_pairs(tmp_path / "pairs", 8, [1, 2])
    keys = dict(base_model=str(vision.save_model(tmp_path / "model", "llava")))
    keys |= {"datasets": [{"path": str(file), "type": "chat_template.default"}]}
    made = matrix.assert_cell(cell, tmp_path, recipe(**keys, **cell.keys))
    if made is not None:
        (row, *_) = made.train_dataset
        batch = made.batcher.collators["train"]([row])
        assert len(batch["images"]["pixel_values"]) == 2 * len(row["images"])


REFUSED = [
    refused("fsdp", ["full_shard"], "It asks for FSDP 1; axolotl took it until 0.19."),
    refused("tiled_mlp", True, "Its gradients are wrong, under `rl: dpo` as well."),
    refused("neftune_noise_alpha", 5.0, NOISE),
    refused("noisy_embedding_alpha", 5.0, NOISE),
    refused("relora", True, "`rl: dpo` ignores its restarts.", jagged_restart_steps=2),
    refused("lisa_step_interval", 2, lisa_n_layers=1),
    refused("use_eaft", True, IGNORED if ignores_losses() else AXOLOTL),
    refused("use_dft", True, AXOLOTL, missing=matrix.without("use_dft")),
    refused(
        "balance_labels",
        True,
        AXOLOTL,
        name="`balance_labels`, `label_balance_window_optim_steps`",
        missing=matrix.without("balance_labels"),
        label_balance_window_optim_steps=2,
    ),
    refused(
        "diffusion_lm",
        {"from_causal_lm": True},
        "Nor does axolotl take it for these models.",
        missing=matrix.without("diffusion_lm"),
    ),
    refused(
        "context_parallel_size",
        2,
        DIVIDED,
        name="`context_parallel_size: 2`, padded",
    ),
    refused(
        "sequence_parallel_degree",
        2,
        "Its name is now `context_parallel_size`.",
        name="`sequence_parallel_degree: 2`",
    ),
    Cell(
        "`context_parallel: {size: 2}`, padded",
        {"context_parallel": {"size": 2}},
        r"`context_parallel.size: 2`.*set `sample_packing: true`",
        note=DIVIDED,
        missing=NO_CONTEXT,
    ),
    refused("tensor_parallel_size", 2, "", name="`tensor_parallel_size: 2`"),
    refused(
        "expert_parallel_size",
        2,
        "axolotl joins the experts of all ranks in a checkpoint of supervised training "
        "only.",
        name="`expert_parallel_size: 2`, `expert_parallel_backend`",
    ),
]
# Values of keys without effect that are not true or false.
VALUES = {
    "bench_dataset": "bench.json",
    "center_rewards_coefficient": 0.1,
    "eot_tokens": ["</s>"],
    "eval_sequence_len": 64,
    "role_boundaries": [{"role": "user", "start": "[user]"}],
    "streaming_multipack_buffer_size": 8,
}
HARMLESS = [
    Cell(
        f"`{key}`",
        {key: VALUES.get(key, True)},
        note="Ignored as in `rl: dpo`, and a line says so.",
    )
    for key in WITHOUT_EFFECT
]


@matrix.cells(HARMLESS)
def test_what_does_nothing_is_said_in_one_line(cell, recipe, tmp_path, caplog):
    ((key, value),) = cell.keys.items()
    line = f"{quote(key, value)} has no effect beside `rl`: "
    cfg = tiny.load_config(tmp_path, recipe(**cell.keys, eval_steps=2))
    assert len([r for r in caplog.records if r.message.startswith(line)]) == 1
    assert cfg.rl == "dpo" and cfg.trainer_cls == plugin.TRAINER


@matrix.cells(REFUSED)
def test_what_would_do_nothing_is_refused(cell, recipe, tmp_path):
    matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))


def without_gpu(name: str, note: str, **keys) -> Cell:
    key = next(iter(keys))
    message = rf"{quote(key, keys[key])} needs a GPU: \w+"
    return Cell(f"{name} without a GPU", keys, refused=message, note=note)


STOPS = "`rl: dpo` stops there with an error of torch's or TRL's."
WITHOUT_GPU = [
    without_gpu(
        "`bf16: auto`, `fp16`, `float16`",
        "`auto` becomes fp16 there: say `bf16: true`. " + STOPS,
        fp16=True,
    ),
    without_gpu(
        "`activation_offloading`",
        STOPS,
        activation_offloading=True,
        gradient_checkpointing=True,
    ),
    without_gpu("`profiler_steps`", STOPS, profiler_steps=1),
]


@matrix.cells(WITHOUT_GPU)
def test_what_needs_a_gpu_is_refused_without_one(cell, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(plugin, "_has_accelerator", lambda: False)
    matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))


# --- nothing forgotten ---------------------------------------------------------------

CELLS: list[Cell] = [
    *CHECKPOINTING,
    *SELECTIVE,
    *OFFLOADING,
    *COMPUTING,
    *OPTIMIZERS,
    ANY_OTHER,
    *SCHEDULES,
    *FOLLOWED,
    OTHER_SCHEDULE,
    *OPTIONS,
    *CONTROLS,
    MAX_KL,
    TRACE,
    SEED,
    DETERMINED,
    RESUME,
    *UNUSED,
    *OUTSIDE,
    *HARMLESS,
    FSDP,
    IMAGES,
    *REFUSED,
    *WITHOUT_GPU,
]


def test_every_hyperparameter_of_the_schema_has_a_cell():
    others = {
        "batch_size": "deprecated by axolotl",
        "eval_batch_size": "data",
        "train_on_inputs": "of supervised data",
        "lr_div_factor": "axolotl reads it nowhere",
        "adam_beta3": "of came_pytorch",
        "adam_epsilon2": "of came_pytorch",
        "torchdistx_path": "of adamw_anyprecision",
        "optim_target_modules": "of galore and apollo",
    }
    tested = {key for cell in CELLS for key in cell.keys}
    tested |= tiny.recipe(Path(), Path(), Path()).keys()
    fields = {*HyperparametersConfig.model_fields, *JaggedLRConfig.model_fields}
    missing = {name for name in fields - tested - others.keys()}
    assert not {n for n in missing if not n.startswith(("qgalore_", "dion_rank"))}


def test_every_tracker_of_the_schema_has_a_cell():
    configs = [c for _, c in inspect.getmembers(integrations, inspect.isclass)]
    names = {n for c in configs for n in getattr(c, "model_fields", {})}
    trackers = {n for n in names if n.startswith("use_")} - {"use_ray"}
    assert trackers <= {key for cell in CELLS for key in cell.keys}
