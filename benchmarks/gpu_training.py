"""Sections of `gpu.py` that train, with axolotl's own path and recipes.

Models are random, of the shapes of Llama 3. What each contender is, and how a run
reports, is as in `train_step.py`; here they run one after the other in one process,
where imports count once.
"""

import argparse
import contextlib
import gc
import io
import os
import random
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_step
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.integrations.base import BasePlugin
from gpu_child import Notes, traceback_lines
from measure import bytes_in_use
from torch.profiler import ProfilerActivity, profile
from train_step import GIB, ON_GPU, Run, logged
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from axolotl_edpo.tools.memory import Arguments
from axolotl_edpo.tools.model_sizes import sizes_of

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
VOCAB = 4096 if ON_GPU else 512  # of the tokenizer; the model's is larger
# Of a micro-batch: with 4 the host sets the pace. Micro-batches of a step.
PAIRS, ACCUMULATION = 8 if ON_GPU else 4, 2
STEPS = 8 if ON_GPU else 2
RANK = 16  # of LoRA
# Of cards whose peak in bfloat16, without sparsity, is known here: TFLOP/s by name.
PEAKS = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989}
FLASH = "flash_attention_2"


def llama(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> LlamaConfig:
    """The shape of a Llama 3."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype=DTYPE,
    )


TOY = LlamaConfig(
    vocab_size=1000,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    architectures=["LlamaForCausalLM"],
    dtype=DTYPE,
)
SMALL = llama(2048, 8192, 16, 32, tied=True) if ON_GPU else TOY  # Llama-3.2-1B
LARGE = llama(4096, 14336, 32, 32, tied=False) if ON_GPU else TOY  # Llama-3-8B


# --- what is trained --------------------------------------------------------------


def pairs(count: int) -> list[dict]:
    """Pairs of random words, on average 512 tokens an answer with its prompt."""
    rng = random.Random(0)
    words = train_step.random_words(VOCAB // 16)
    shorter = 1 if ON_GPU else 25

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high) // shorter))

    def pair() -> dict:
        asked = {"role": "user", "content": text(200, 200)}
        answers = {
            part: [asked, {"role": "assistant", "content": text(150, 450)}]
            for part in ("chosen", "rejected")
        }
        return {"prompt": asked["content"], **answers}

    return [pair() for _ in range(count)]


class World:
    """A model, a tokenizer and pairs in a folder, and the recipes over them.

    Args:
        folder: Does not exist.
        config: Of the model.
        steps: Optimizer steps for which there are pairs.
        weights: Whether the model's are there, or made when it is loaded.
    """

    def __init__(self, folder: Path, config: LlamaConfig, steps: int, weights: bool):
        folder.mkdir()
        gc.freeze()  # axolotl collects garbage often; imports are never any
        self.folder, self.config, self._weights = folder, config, weights
        data = pairs(steps * PAIRS * ACCUMULATION)
        tokenizer = train_step.make_tokenizer(data, VOCAB)
        tokenizer.save_pretrained(folder / "model")
        if weights:
            with made_on_gpu():
                LlamaForCausalLM(config).save_pretrained(folder / "model")
            release()
        else:
            config.save_pretrained(folder / "model")
        self._data = train_step.dataset(folder / "pairs.jsonl", data, self.options())

    def options(self, adapter: str | None = None, attention: str = "sdpa"):
        """As of `train_step.py`'s command line."""
        return argparse.Namespace(
            sequence_len=1024,
            micro_batch=PAIRS,
            accumulation=ACCUMULATION,
            type=None,
            field=[],
            attention=attention,
            adapter=adapter,
            gradient_checkpointing=True,
        )

    def recipe(self, name: str, contender: str, options, **keys: Any) -> Path:
        """Writes a contender's recipe under a name; keys are added, None removes."""
        base = train_step.base_recipe(self.folder, self._data, options)
        base["base_model"] = str(self.folder / "model")
        made = train_step.recipe(contender, base, self.folder, options)
        made["output_dir"] = str(self.folder / f"out_{name}")
        if not self._weights:
            plugins = keys.get("plugins", made["plugins"])
            keys["plugins"] = [*plugins, "gpu_training.MadeOnGPU"]
            keys["reinit_weights"] = True
        made = {k: v for k, v in {**made, **keys}.items() if v is not None}
        path = self.folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(made))
        return path


@contextlib.contextmanager
def made_on_gpu():
    """Within it, models are made where there is a GPU, in the dtype they train in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(before)


class MadeOnGPU(BasePlugin):
    """Random weights of a large model in seconds: where they will be used."""

    def pre_model_load(self, cfg) -> None:
        """Before axolotl makes the model from its config."""
        self._within = contextlib.ExitStack()
        self._within.enter_context(made_on_gpu())

    def post_model_build(self, cfg, model) -> None:
        """After it."""
        self._within.close()


def release() -> None:
    """Gives back what a run before this one held."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train_recipe(path: Path) -> tuple[Run, str]:
    """Trains a recipe as `axolotl train` does after its launcher.

    Returns:
        What it reported, and its output.
    """
    torch.manual_seed(0)
    cfg = load_cfg(str(path))
    release()  # plugins have let go of the run before
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            do_train(cfg, TrainerCliArgs())
    finally:
        print(output.getvalue(), flush=True)
    return train_step.reported(output.getvalue(), bytes_in_use()), output.getvalue()


# --- train -----------------------------------------------------------------------

# Contender of train_step.py, attention, adapter.
CONTENDERS = {
    "dpo": ("dpo", "sdpa", None),
    "dpo, chunked head": ("dpo-chunked", "sdpa", None),
    "padded": ("padded", "sdpa", None),
    "shared": ("shared", "sdpa", None),
    "cached": ("cached", "sdpa", None),
    "shared, FlashAttention": ("shared", FLASH, None),
    "dpo, chunked head, LoRA": ("dpo-chunked", "sdpa", "lora"),
    "shared, LoRA": ("shared", "sdpa", "lora"),
}
TOY_CONTENDERS = ("dpo, chunked head", "shared", "cached", "shared, LoRA")


def train(note: Notes) -> None:
    """Each contender of `CONTENDERS` in turn.

    Raises:
        RuntimeError: Names those that failed.
    """
    world = World(Path("world").resolve(), SMALL, STEPS, weights=True)
    note("shapes", described(world))
    runs: dict[str, list[Run]] = {}

    def measure(name: str) -> None:
        contender, attention, adapter = CONTENDERS[name]
        options = world.options(adapter, attention)
        path = world.recipe(name, contender, options)
        runs[name] = [train_noted(note, name, world, path, contender, options)]
        train_step.check_same_work(runs)

    reasons = {name: lacks(name) for name in CONTENDERS}
    guard(note, {n: partial(measure, n) for n, reason in reasons.items() if not reason})
    for name, reason in reasons.items():
        if reason:
            note(name, reason)


def lacks(name: str) -> str:
    """Why a contender cannot run here; empty where it can."""
    contender, attention, _ = CONTENDERS[name]
    if attention == FLASH and not ON_GPU:
        return "needs a GPU"
    if not (ON_GPU or name in TOY_CONTENDERS):
        return "left out at toy sizes"
    return train_step.lacks_liger() if contender == "dpo-chunked" else ""


def guard(note: Notes, runs: dict[str, Callable[[], Any]]) -> None:
    """Runs each; an error is noted and does not keep the next from running.

    Raises:
        RuntimeError: At the end, if there was an error.
    """
    failed = []
    for name, run in runs.items():
        try:
            run()
        except (Exception, SystemExit) as error:
            lines = traceback_lines(8)
            note(f"{name}: error", [f"{type(error).__name__}: {error}", *lines])
            failed.append(name)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} failed: {', '.join(failed)}")


def train_noted(
    note: Notes, name: str, world: World, path: Path, contender: str, options
) -> Run:
    """Trains a contender and notes its speed, its memory and its first step.

    Raises:
        RuntimeError: If it did not train what its name says, or if policy and reference
            differ before the first step.
    """
    run, output = train_recipe(path)
    moved: Any = "-"
    if contender not in train_step.RIVALS:
        shares = ("kl/p_epsilon_steps", "kl/n_epsilon_steps")
        moved = sum(logged(output, key)[0] for key in shares)
    entries = {**row(run), **rate(world.config, run, full=not options.adapter)}
    entries |= {"loss of step 1": run.first_loss, "β moved in step 1": moved}
    entries |= expected(world.config, run, contender, options)
    note(name, entries)
    train_step.check_head(contender, run)
    train_step.check_start(name, run)
    if moved not in ("-", 0.0):
        raise RuntimeError(f"β moved for {moved:.1%} of the pairs of the first step")
    return run


def described(world: World) -> str:
    """Model and batches."""
    config = world.config
    return (
        f"random Llama, hidden {config.hidden_size}, "
        f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size}, "
        f"{str(DTYPE).removeprefix('torch.')}, "
        f"gradient checkpointing; {PAIRS} pairs per micro-batch, {ACCUMULATION} "
        f"micro-batches per step; LoRA of rank {RANK} on all linear layers"
    )


def rate(config: LlamaConfig, run: Run, full: bool) -> dict[str, Any]:
    """Matrix products that DPO asks for, per second of a run.

    Counted as if every prompt were there twice and nothing were cached. Of the body:
    reference, policy, and backward once or, where all weights train, twice; of the head
    3 or 4. What checkpointing or the head repeats, attention and adapters do not count.
    """
    sizes = sizes_of(config)
    body = run.tokens * sizes.linear * (3 + full)
    head = run.scored * sizes.head * (4 if full else 3)
    teraflops = 2 * (body + head) / (run.step_seconds * run.steps) / 1e12
    peak = PEAKS.get(torch.cuda.get_device_name()) if ON_GPU else None
    share = teraflops / peak if peak else "-"
    return {"TFLOP/s": teraflops, "of the peak": share}


def row(run: Run) -> dict[str, Any]:
    """Speed and memory of a run."""
    seconds = run.step_seconds * run.steps
    return {
        "s/step": run.step_seconds,
        "tokens/s": run.tokens / seconds,
        "pairs/s": run.pairs / seconds,
        "host's CPU s/step": run.cpu_seconds,
        "cache, s": run.cache_seconds,
        "peak GiB": run.peak_bytes / GIB,
        "before it, GiB": run.imports_bytes / GIB,
    }


def expected(config: LlamaConfig, run: Run, contender: str, options) -> dict[str, Any]:
    """Memory by `axolotl_edpo.tools.memory`, for the mean tokens of a micro-batch."""
    if contender in train_step.RIVALS:
        return {"calculated GiB": "-"}
    full = not options.adapter
    need = Arguments(
        sizes_of(config),
        "ddp",
        ranks=1,
        tokens=run.tokens // (run.steps * ACCUMULATION),
        lora=0 if full else RANK,
        cached=train_step.caches(contender),
        itemsize=DTYPE.itemsize,
        float32_root=full and options.attention == "sdpa",
        device=DEVICE,
    ).memory
    return {"calculated GiB": need.total / GIB}


# --- sync ------------------------------------------------------------------------

WARNING = "called a synchronizing CUDA operation"


class Audit(BasePlugin):
    """Watches one optimizer step for waiting, and profiles the next."""

    found: dict[str, Any] = {}

    def post_trainer_create(self, cfg, trainer) -> None:
        """Joins the trainer."""
        trainer.add_callback(Auditor(self.found))


class Auditor(TrainerCallback):
    """Fills `found` with the places that waited, and with the profile.

    A step is what lies between the ends of two: logging and collation are in it.
    """

    def __init__(self, found: dict[str, Any]):
        self._found = found
        self._places: Counter[str] = Counter()

    def on_step_end(self, args, state, control, **kwargs):
        """The second step is watched, the third profiled."""
        if state.global_step == 1:
            self._noticing = warnings.catch_warnings()
            self._noticing.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self._notice
            torch.cuda.set_sync_debug_mode("warn")
        if state.global_step == 2:
            torch.cuda.set_sync_debug_mode("default")
            self._noticing.__exit__(None, None, None)
            self._found["places"] = self._places
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
        if state.global_step == 3:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self._found["profile"] = self._profile

    def _notice(self, message, category, filename, lineno, file=None, line=None):
        if WARNING in str(message):
            self._places[place(traceback.extract_stack())] += 1


def place(stack: traceback.StackSummary) -> str:
    """The last frames of a stack, without those that warn and torch's own."""
    frames = [f for f in stack if "warnings" not in f.filename]
    frames = [f for f in frames if Path(f.filename) != Path(__file__)] or frames
    short = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-5:]]
    return " > ".join(short)


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what the intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return covered


def sync(note: Notes) -> None:
    """One LoRA run of three steps."""
    world = World(Path("world").resolve(), SMALL, 3, weights=False)
    note("shapes", described(world))
    options = world.options("lora")
    plugins = [*train_step.SHARED["plugins"], "gpu_training.Audit"]
    train_recipe(world.recipe("sync", "shared", options, plugins=plugins))
    places = Audit.found["places"]
    note("waits for the GPU in one optimizer step", sum(places.values()))
    note("micro-batches in it", ACCUMULATION)
    for where, count in places.most_common(25):
        note(where, {"waits": count})
    on_gpu = [
        (event.time_range.start, event.time_range.end)
        for event in Audit.found["profile"].events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation  # a range of the host's
    ]
    whole = max(stop for _, stop in on_gpu) - min(start for start, _ in on_gpu)
    note("an optimizer step from its first kernel to its last, ms", whole / 1e3)
    note("share of it in which the GPU is busy", busy(on_gpu) / whole)
    note("kernels and copies in it", len(on_gpu))
    kernels = Audit.found["profile"].key_averages()
    for event in sorted(kernels, key=lambda e: -e.count)[:12]:
        spent = {"calls": event.count, "kernel, ms": event.device_time_total / 1e3}
        note(event.key[:60], spent)


# --- large -----------------------------------------------------------------------


def large(note: Notes) -> None:
    """LoRA on a large model, which is made on the GPU."""
    world = World(Path("world").resolve(), LARGE, min(STEPS, 4), weights=False)
    note("shapes", described(world))

    options = world.options("lora")

    def measure(contender: str) -> None:
        path = world.recipe(contender, contender, options)
        train_noted(note, contender, world, path, contender, options)

    contenders = ("shared", "dpo-chunked") if ON_GPU else ("shared",)
    guard(note, {name: partial(measure, name) for name in contenders})


# --- rest ------------------------------------------------------------------------


def rest(note: Notes) -> None:
    """What has a path of its own on a GPU, with a tiny model."""
    tiny = LlamaConfig.from_dict({**TOY.to_dict(), "hidden_size": 64, "head_dim": 16})
    world = World(Path("world").resolve(), tiny, 4, weights=True)
    note("shapes", described(world))
    env = dict(os.environ)  # axolotl writes into it as it trains
    four_bit = {"adapter": "qlora", "load_in_4bit": True, "bf16": True}
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "QLoRA, NF4": lambda: here(world, "qlora", "lora", **four_bit),
        "LoRA": lambda: here(world, "plain", "lora"),
        # before LoRA kernels, for which axolotl patches the attention of this process
        "LoRA, fp16": lambda: here(world, "fp16", "lora", fp16=True, bf16=False),
        "LoRA kernels": lambda: here(world, "kernels", "lora", **KERNELS),
        "QLoRA, LoRA kernels": lambda: here(
            world, "qlora-kernels", "lora", **four_bit, **KERNELS
        ),
        "torchrun, DDP": lambda: launched(world, env, "ddp"),
        "torchrun, FSDP2": lambda: launched(world, env, "fsdp2", **FSDP2),
    }
    able = {name: way for name, way in ways.items() if ON_GPU or name in ON_ANY_DEVICE}
    guard(note, {name: partial(noted, note, name, way) for name, way in able.items()})
    for name in ways:
        if name not in able:
            note(name, "needs a GPU")


def noted(note: Notes, name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Notes what a run returns."""
    note(name, run())


ON_ANY_DEVICE = ("QLoRA, NF4", "LoRA")
KERNELS = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), True)
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}


def here(world: World, name: str, method: str, **keys: Any) -> dict[str, Any]:
    """Trains in this process and tells how losses and β went."""
    path = world.recipe(name, "shared", world.options(method), **keys)
    return course(train_recipe(path)[1])


def course(output: str) -> dict[str, Any]:
    """Losses, gradients and β of a run, step by step."""
    return {
        "losses": logged(output, "loss"),
        "gradient norms": logged(output, "grad_norm"),
        "β": logged(output, "kl/beta"),
        "distance from the reference": logged(output, "kl/policy_ref"),
    }


def launched(world: World, env: dict, name: str, **keys: Any) -> dict[str, Any]:
    """The same under torchrun, on one rank, over NCCL.

    Raises:
        RuntimeError: If it fails, with the end of its output.
    """
    path = world.recipe(name, "shared", world.options(), **keys)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "1", "-m", "axolotl.cli.train", str(path)]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"ended with {done.returncode}:\n{end}")
    return course(done.stdout)
