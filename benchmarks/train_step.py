"""Training runs of `rl: edpo`, padded, packed and cached, against those of `rl: dpo`.

    python benchmarks/train_step.py                  # synthetic pairs
    python benchmarks/train_step.py --data a.jsonl --data b.jsonl --write
    python benchmarks/train_step.py --adapter lora --repeats 3
    python benchmarks/train_step.py --contenders cached --baseline shared
    python benchmarks/train_step.py --contenders cached --baseline shared --before DIR
    python benchmarks/train_step.py --model DIR --attention flash_attention_2 \
        --data c.jsonl --type chat_template.default --field field_messages=question

A random Llama, or the model in `--model`, is trained for one epoch on the first
`--pairs` pairs of each file, by `axolotl train` in a process of its own; contenders
take turns. Measured are

    pairs per second    by the trainer's own `train_runtime`, which begins after loading
                        and tokenizing
    step time           from the end of the first step to the end of the last
    CPU time            of all threads of the process over the same steps; what else the
                        machine does moves it least
    peak memory         the most in use: the resident set of the process, or what torch
                        allocated on the GPU
    beyond the imports  of the peak, what was not there before the first model was
                        loaded: Python, libraries and data are about 1 GiB

There are two rivals: `rl: dpo`, and the same with TRL's chunked head, whose logits are
never there as a whole. (It needs liger-kernel; axolotl 0.20 has one that is too old for
its TRL.) All is relative to the second where it can run, or to `--baseline`.

With β 0.1 the first loss of all runs must be log 2 = 0.6931. A run that begins
elsewhere, a rival that took the other's head, and contenders whose pairs, optimizer
steps or tokens differ are an error.

With `--before DIR`, each contender of `rl: edpo` also takes turns with the package of
another checkout, in its own row.

With `precompute_ref_log_probs`, what takes its turn is a run that finds the cache; one
more run before fills it.

A file has one pair per line. Without `--type`, `chosen` and `rejected` are lists of
messages: whole conversations or, in files with a `prompt`, the answers to it. Synthetic
pairs are random words with the lengths of the test split of harmless-base of
Anthropic's hh-rlhf.

The first run on a GPU compiles kernels: use `--repeats 3` there. Up to 0.20 axolotl's
DPO trainer also collects garbage after every micro-batch, which costs a small model
much of its time on a CPU.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import re
import statistics
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import yaml
from axolotl.integrations.base import BasePlugin
from measure import append_results, bytes_in_use, environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.import_utils import LIGER_KERNEL_MIN_VERSION, is_liger_kernel_available

PROBE = "train_step.Probe"
DPO: dict[str, Any] = {"rl": "dpo", "plugins": [PROBE]}
# makes the logits of a few tokens at a time, or of a pair before TRL 1.14
CHUNKED = {**DPO, "dpo_use_liger_kernel": True}
EDPO: dict[str, Any] = {
    "rl": "edpo",
    "plugins": [PROBE, "axolotl_edpo.EDPOPlugin"],
    "edpo_epsilon": 0.01,
}
PACKED = {**EDPO, "sample_packing": True}
# not `auto`: a model that cannot share is an error and not measured as `packed`
SHARED = {**PACKED, "edpo_prefix_sharing": True}
CACHED = {"precompute_ref_log_probs": True}
FIXED = {**SHARED, "edpo_control": "fixed", "edpo_epsilon": None}
# Recipe keys of each contender.
CONTENDERS = {
    "dpo": DPO,
    "dpo-chunked": CHUNKED,
    "padded": EDPO,
    "padding-free": {**EDPO, "dpo_padding_free": True, "edpo_prefix_sharing": False},
    "packed": {**PACKED, "edpo_prefix_sharing": False},
    "shared": SHARED,
    "padded-cached": {**EDPO, **CACHED},
    "cached": {**SHARED, **CACHED},
    "traced": {**SHARED, "edpo_log_pairs": 1},
    "fixed": FIXED,
    "reference-free": {**FIXED, "dpo_loss_type": ["simpo"], "simpo_gamma": 0.0},
    "batch_margin": {**SHARED, "edpo_control": "batch_margin", "edpo_epsilon": None},
}
RIVALS = ("dpo", "dpo-chunked")
# What the name of a contender ends with that runs the package of another checkout.
BEFORE = " before"
MORE = ("padding-free", "padded-cached", "traced", "fixed", "reference-free")
MORE += ("batch_margin",)
DEFAULT = [name for name in CONTENDERS if name not in MORE]
LEGEND = (
    "Contenders: `dpo` is axolotl's `rl: dpo` and `dpo-chunked` the same with "
    "`dpo_use_liger_kernel: true` (on a CPU without Liger's Triton kernels in the "
    "layers); the others are `rl: edpo`: `padded`; `padding-free` with "
    "`dpo_padding_free`; `packed` with `sample_packing`; `shared` the same with each "
    "prompt in its row once; `cached` that, and `padded-cached` as `padded`, with "
    "`precompute_ref_log_probs`, where the cache is there; `traced` as `shared` with "
    "`edpo_log_pairs: 1`; `fixed` and `batch_margin` as `shared` with that "
    "`edpo_control`; `reference-free` as `fixed` with `dpo_loss_type: [simpo]`, γ 0."
)
# What liger-kernel may put into a model's layers.
LAYER_KERNELS = (
    "rope",
    "rms_norm",
    "layer_norm",
    "swiglu",
    "geglu",
    "cross_entropy",
    "fused_linear_cross_entropy",
)
ON_GPU = torch.cuda.is_available()
MIB, GIB = 2**20, 2**30
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# tokens of their own: nothing merges over the border of prompt and answer
ROLES = ["<system>", "<user>", "<assistant>", "<tool>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# tokens of hh-rlhf's harmless-base, test split; medians of the answers follow from
# their ratio to the mean in words
TOKENS_MEAN_MEDIAN = {"prompt": (108, 76), "chosen": (42, 29), "rejected": (52, 36)}
TOKENS_LONGEST = 836
SYNTHETIC_PAIRS = 1000  # where all are asked for


@dataclass(frozen=True)
class Run:
    """What one training run reported.

    Attributes:
        seconds: `train_runtime`.
        cache_seconds: Of these, until the cache was there.
        step_seconds: Per step, without the first.
        cpu_seconds: Likewise, of all threads.
        waited: Share of those steps that was waiting for the cache.
        peak_bytes: Most memory in use.
        imports_bytes: In use before the first model was loaded.
        logits_bytes: Largest logits that the policy's head made.
        first_loss: Loss of the first optimizer step.
        pairs: Pairs of the epoch; those longer than `sequence_len` are not among them.
        steps: Optimizer steps.
        tokens: Tokens of all sequences, padding apart, shared or not.
        scored: Of these, in answers.
        reference_bytes: Weights of a reference of its own, at the end.
        trace_seconds: Of `edpo_log_pairs`, noting and writing.
    """

    seconds: float
    cache_seconds: float
    step_seconds: float
    cpu_seconds: float
    waited: float
    peak_bytes: int
    imports_bytes: int
    logits_bytes: int
    first_loss: float
    pairs: int
    steps: int
    tokens: int
    scored: int
    reference_bytes: int
    trace_seconds: float

    @property
    def extra_bytes(self) -> int:
        """Of the peak, what is beyond the imports."""
        return self.peak_bytes - self.imports_bytes

    def work(self) -> str:
        """What all contenders must have in common."""
        return f"{self.pairs} pairs, {self.steps} steps, {self.tokens:,} tokens"

    def evidence(self) -> str:
        """What shows that the contenders train the same thing."""
        told = (
            f"loss of step 1: {self.first_loss:.4f}; "
            f"{self.steps} steps, {self.tokens:,} tokens; "
            f"largest logits {self.logits_bytes / MIB:.1f} MiB; "
            f"reference's own weights at the end: {self.reference_bytes / MIB:.1f} MiB"
        )
        if not self.trace_seconds:
            return told
        share = self.trace_seconds / (self.step_seconds * self.steps)
        return f"{told}; the trace took {share:.2%} of the time"

    def speed(self) -> str:
        """The time, which depends on the machine."""
        return (
            f"{self.pairs / self.seconds:.2f} pairs/s, {self.seconds:.2f} s, "
            f"{self.step_seconds:.3f} s per step, {self.cpu_seconds:.3f} s of CPU"
        )

    def memory(self) -> str:
        """The peak, and what of it is beyond the imports."""
        whole, extra = self.peak_bytes / GIB, self.extra_bytes / GIB
        return f"{whole:.2f} GiB, {extra:.2f} GiB beyond the imports"


@dataclass(frozen=True)
class Filling:
    """What the run that filled a cache reported.

    Attributes:
        seconds: Of the pass.
        size: Bytes on disk.
    """

    seconds: float
    size: int

    def note(self, own: list[Run], baseline: list[Run]) -> str:
        """The cost of the cache, given the runs that found it and the baseline's."""
        epoch = min(run.step_seconds * run.steps for run in baseline)
        found = min(run.cache_seconds for run in own)
        waited = statistics.median(run.waited for run in own)
        return (
            f"cache: {self.size / MIB:.1f} MiB, filled in {self.seconds / epoch:.2f} × "
            f"and checked in {found / epoch:.2f} × the time of an epoch of the "
            f"baseline; waited {waited:.2%} of the time for it"
        )


class Clock(TrainerCallback):
    """When steps ended, in seconds, and what the cache took before and during them."""

    def __init__(self, trainer):
        self._trainer = trainer
        self.cache_seconds = 0.0
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.waited: list[float] = []
        # `rl: dpo` has no reference of this kind
        self._reference = getattr(trainer, "reference", None)
        if hasattr(self._reference, "fill"):
            self._fill = self._reference.fill
            self._reference.fill = self.fill

    def fill(self, *args, **keywords) -> None:
        """Fills the cache, and measures how long it takes."""
        began = perf_counter()
        self._fill(*args, **keywords)
        self.cache_seconds = perf_counter() - began

    def on_step_end(self, args, state, control, **kwargs):
        """Notes the time, after the GPU has finished the step."""
        if ON_GPU:
            torch.cuda.synchronize()
        self.ends.append(perf_counter())
        self.cpu.append(process_time())
        self.waited.append(getattr(self._reference, "waited", 0.0))

    def found(self) -> dict[str, float]:
        """As `Run` has it.

        Raises:
            ValueError: If there was one step only.
        """
        if len(self.ends) < 2:
            raise ValueError("a step's time shows from the second on: more --pairs")
        spent, steps = self.ends[-1] - self.ends[0], len(self.ends) - 1
        return {
            "cache_seconds": self.cache_seconds,
            "step_seconds": spent / steps,
            "cpu_seconds": (self.cpu[-1] - self.cpu[0]) / steps,
            "waited": (self.waited[-1] - self.waited[0]) / spent,
        }


class Probe(BasePlugin):
    """Lets a run print what its log does not, or only rounded."""

    def register(self, cfg) -> None:
        """A run begins, of which there may be several in a process."""
        self.imports_bytes: int | None = None
        self.logits_bytes = 0
        self._trainer = self._clock = None  # those of the run before

    def pre_model_load(self, cfg) -> None:
        """Notes the memory in use; the reference comes here after the policy."""
        if self.imports_bytes is None:
            self.imports_bytes = bytes_in_use()

    def get_training_args(self, cfg) -> dict[str, Any] | None:
        """Leaves the layers of a model on a CPU as they are."""
        # transformers takes the chunked head's switch for its own as well and puts
        # Triton kernels into the layers, which need a GPU; the chunked head does not
        if cfg.dpo_use_liger_kernel and not ON_GPU:
            return {"liger_kernel_config": dict.fromkeys(LAYER_KERNELS, False)}
        return None

    def post_trainer_create(self, cfg, trainer) -> None:
        """Keeps the trainer for the end of the run; times steps, measures logits."""
        self._trainer, self._clock = trainer, Clock(trainer)
        trainer.add_callback(self._clock)
        head = trainer.model.get_output_embeddings()
        head.register_forward_hook(self._measure_logits)

    def _measure_logits(self, head, inputs, output) -> None:
        # `rl: edpo` has its own op run as the head's forward: no logits come out of it
        if isinstance(output, torch.Tensor):
            self.logits_bytes = max(self.logits_bytes, output.nbytes)

    def post_train(self, cfg, model) -> None:
        """After the last optimizer step; no GPU, no bytes."""
        # not above: what `rl: dpo` trains with is not this package
        from axolotl_edpo.data.columns import scored_lengths

        trainer = self._trainer
        history, pairs = trainer.state.log_history, trainer.train_dataset
        scored = scored_lengths(pairs, trainer.args.max_length).sum()
        tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
        print({"trained_pairs": len(pairs)})
        print({"trained_tokens": int(tokens[-1])})
        print({"scored_tokens": int(scored)})
        print({"peak_gpu_bytes": torch.cuda.max_memory_allocated()})
        print({"imports_bytes": self.imports_bytes})
        print({"logits_bytes": self.logits_bytes})
        print({"reference_bytes": reference_bytes(trainer)})
        trace = getattr(getattr(trainer, "records", None), "trace", None)
        print({"trace_seconds": trace.seconds if trace else 0.0})
        print(self._clock.found())


def reference_bytes(trainer) -> int:
    """Weights of the reference that are not the policy's, whole or its head."""
    reference = getattr(trainer, "reference", None)
    head = getattr(reference, "kept_head", None)
    weights = head.tensors if head else ()
    if trainer.ref_model is not None:
        weights = trainer.ref_model.parameters()
    return sum(weight.nbytes for weight in weights)


# --- pairs -----------------------------------------------------------------------


def random_words(count: int) -> list[str]:
    """Words of three to seven letters; fewer of them are the first of more."""
    rng = random.Random(0)
    letters = string.ascii_lowercase
    return ["".join(rng.choices(letters, k=rng.randint(3, 7))) for _ in range(count)]


def synthetic_pairs(count: int, vocab: int) -> list[dict]:
    """Pairs of random words, about as long in tokens as those of hh-rlhf."""
    rng = random.Random(0)
    words = random_words(vocab // 16)

    def text(part: str) -> str:
        mean, median = TOKENS_MEAN_MEDIAN[part]
        sigma = math.sqrt(2 * math.log(mean / median))
        length = rng.lognormvariate(math.log(median), sigma)
        return " ".join(
            rng.choices(words, k=min(max(1, round(length)), TOKENS_LONGEST))
        )

    def pair() -> dict:
        question = text("prompt")
        asked = {"role": "user", "content": question}
        answers = {
            part: [asked, {"role": "assistant", "content": text(part)}]
            for part in ("chosen", "rejected")
        }
        return {"prompt": question, **answers}

    return [pair() for _ in range(count)]


def read_pairs(path: Path, count: int | None) -> list[dict]:
    """The first pairs of a file; None: all of them."""
    with path.open() as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def dataset(path: Path, pairs: list[dict], args: argparse.Namespace) -> dict:
    """Writes the pairs; returns the entry of `datasets:` that reads them."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    entry = {"path": str(path), "ds_type": "json", "split": "train"}
    if args.type:
        entry |= {"type": args.type}
    elif "prompt" in pairs[0]:
        entry |= {"type": "chat_template.default", "field_messages": "prompt"}
    else:
        entry |= {"type": "chat_template.argilla_chat"}
    return entry | dict(args.field)


def texts(value: object) -> Iterator[str]:
    """All strings of a pair, whatever its format."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


# --- model and recipe --------------------------------------------------------------


def make_tokenizer(pairs: list[dict], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, learned from the pairs and from random words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " ".join(random_words(vocab))
    tokenizer.train_from_iterator([*texts(pairs), words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **SPECIAL
    )


def save_llama(folder: Path, vocab: int, hidden: int, layers: int, length: int) -> None:
    """A random Llama for sequences up to a length."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def base_model(folder: Path, pairs: list[dict], args: argparse.Namespace) -> Path:
    """The model of `--model`, or a new one in this folder with a tokenizer."""
    if args.model:
        return args.model.resolve()
    save_llama(folder, args.vocab, args.hidden, args.layers, args.sequence_len)
    make_tokenizer(pairs, args.vocab).save_pretrained(folder)
    return folder


def base_recipe(folder: Path, data: dict, args: argparse.Namespace) -> dict[str, Any]:
    """What all recipes have in common."""
    keys = {
        "rl_beta": 0.1,
        "datasets": [data],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "sequence_len": args.sequence_len,
        "micro_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "bf16": ON_GPU,
        "tf32": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
    }
    if data["type"].startswith("chat_template"):
        keys["chat_template"] = "tokenizer_default"
    return keys


def recipe(name: str, base: dict, folder: Path, args: argparse.Namespace) -> dict:
    """The recipe of a contender."""
    keys = {
        **base,
        **keys_of(name),
        "output_dir": str(folder / f"out_{name}"),
        "attn_implementation": args.attention,
    }
    if args.gradient_checkpointing:
        keys["gradient_checkpointing"] = True
        keys["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if args.adapter == "lora":
        keys |= {"adapter": "lora", "lora_r": 16, "lora_alpha": 32}
        keys["lora_target_linear"] = True
    if caches(name):
        keys["edpo_reference_cache"] = str(cache_of(folder, name))
    return keys


def keys_of(name: str) -> dict[str, Any]:
    """The recipe keys of a contender, whichever checkout it runs."""
    return CONTENDERS[name.removesuffix(BEFORE)]


def caches(name: str) -> bool:
    """Whether a contender has a cache."""
    return CACHED.items() <= keys_of(name).items()


def cache_of(folder: Path, name: str) -> Path:
    """Where a contender's cache is."""
    return folder / f"reference_{name}"


def write_recipes(
    folder: Path, model: Path, pairs: list[dict], args: argparse.Namespace
) -> dict[str, Path]:
    """The pairs and the recipes of all contenders."""
    folder.mkdir()
    data = dataset(folder / "pairs.jsonl", pairs, args)
    base = {"base_model": str(model), **base_recipe(folder, data, args)}
    names = with_before(args.contenders) if args.before else args.contenders
    recipes = {name: folder / f"{name}.yml" for name in names}
    for name, path in recipes.items():
        path.write_text(yaml.safe_dump(recipe(name, base, folder, args)))
    return recipes


def with_before(names: Sequence[str]) -> list[str]:
    """Contenders, each of `rl: edpo` followed by the same of another checkout."""
    both = ([n] if n in RIVALS else [n, n + BEFORE] for n in names)
    return [*itertools.chain(*both)]


# --- runs ------------------------------------------------------------------------


def child_environment(
    cache: Path, threads: int, checkout: Path | None = None
) -> dict[str, str]:
    """One device, no network, this folder importable, a cache that goes with it.

    Args:
        cache: Of data sets.
        threads: Of the process.
        checkout: Whose package and probe run; by default those that are there.
    """
    search = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    if checkout is not None:
        search = [str(checkout / "benchmarks"), str(checkout), *search]
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        "PATH": os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        ),
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache),
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits takes no CPU time
    }


def run_axolotl(command: list[str], log: Path, env: dict[str, str]) -> tuple[str, int]:
    """Runs a command of axolotl.

    Returns:
        Its output and the most memory its process held, in bytes.

    Raises:
        RuntimeError: If it fails, with the end of its output.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "axolotl.cli.main", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    output = log.read_text(errors="replace")
    if process.returncode:
        end = "\n".join(output.splitlines()[-30:])
        raise RuntimeError(f"axolotl {' '.join(command)} failed:\n{end}")
    unit = 1 if sys.platform == "darwin" else 1024
    return output, usage.ru_maxrss * unit


def logged(output: str, key: str) -> list[float]:
    """All values of a key in the dictionaries that a run printed."""
    found = re.findall(rf"'{key}': '?([-+.\w]+)", output)
    if not found:
        raise RuntimeError(f"the run printed no {key!r}:\n{output[-2000:]}")
    return [float(value) for value in found]


def train(path: Path, env: dict[str, str]) -> Run:
    """Trains a recipe and reads what it reported."""
    command = ["train", str(path), "--launcher", "python"]
    return reported(*run_axolotl(command, path.with_suffix(".log"), env))


def reported(output: str, resident: int) -> Run:
    """What a run printed; `resident` is its peak memory where there is no GPU."""
    losses = logged(output, "loss")
    return Run(
        seconds=logged(output, "train_runtime")[-1],
        peak_bytes=int(logged(output, "peak_gpu_bytes")[-1]) or resident,
        imports_bytes=int(logged(output, "imports_bytes")[-1]),
        logits_bytes=int(logged(output, "logits_bytes")[-1]),
        cache_seconds=logged(output, "cache_seconds")[-1],
        step_seconds=logged(output, "step_seconds")[-1],
        cpu_seconds=logged(output, "cpu_seconds")[-1],
        waited=logged(output, "waited")[-1],
        first_loss=losses[0],
        pairs=int(logged(output, "trained_pairs")[-1]),
        steps=len(losses),
        tokens=int(logged(output, "trained_tokens")[-1]),
        scored=int(logged(output, "scored_tokens")[-1]),
        reference_bytes=int(logged(output, "reference_bytes")[-1]),
        trace_seconds=logged(output, "trace_seconds")[-1],
    )


def fill(name: str, path: Path, env: dict[str, str]) -> Filling:
    """Trains a recipe whose cache is not there yet."""
    run = train(path, env)
    size = size_of(cache_of(path.parent, name))
    print(
        f"  {run.speed()}; the pass {run.cache_seconds:.2f} s, {size / MIB:.1f} MiB",
        flush=True,
    )
    return Filling(run.cache_seconds, size)


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def take_turns(
    data: str, recipes: dict[str, Path], args: argparse.Namespace
) -> tuple[dict[str, list[Run]], dict[str, Filling]]:
    """Trains the contenders in turn, after preparing what they find.

    Returns:
        The runs of each, in the order of the recipes, and what filled the caches.

    Raises:
        RuntimeError: If a contender did not train what its name says, or others
            something else.
    """
    first = next(iter(recipes.values()))
    folder = first.parent
    env = child_environment(folder / "cache", args.threads)
    other = child_environment(folder / "cache", args.threads, args.before)
    envs = {name: other if name.endswith(BEFORE) else env for name in recipes}
    run_axolotl(["preprocess", str(first)], folder / "preprocess.log", env)
    fillings = {}
    for name in filter(caches, recipes):
        print(f"{data}: {name}, filling its cache ...", flush=True)
        fillings[name] = fill(name, recipes[name], envs[name])
    runs: dict[str, list[Run]] = {name: [] for name in recipes}
    for repeat in range(args.repeats):
        for name, path in recipes.items():
            print(f"{data}: {name}, run {repeat + 1} of {args.repeats} ...", flush=True)
            run = train(path, envs[name])
            print(f"  {run.speed()}; {run.memory()}; {run.evidence()}", flush=True)
            runs[name].append(run)
            check_start(name, run)
            check_head(name, run)
            check_preparation(folder / "prepared", name)
            check_same_work(runs)
    return runs, fillings


def check_preparation(prepared: Path, name: str) -> None:
    """That a contender used what was prepared, and prepared nothing of its own.

    Raises:
        RuntimeError: Names the contender.
    """
    found = [path.name for path in prepared.iterdir() if path.is_dir()]
    if len(found) != 1:
        raise RuntimeError(
            f"{name} prepared a dataset of its own: {prepared} holds {found}"
        )


def check_start(name: str, run: Run) -> None:
    """That policy and reference were equal at the first step, or had no reference.

    A random model gives both answers nearly the same log-probability per token.

    Raises:
        RuntimeError: Names the contender.
    """
    # the margin is for bfloat16, where two heads or kernels round differently
    if abs(run.first_loss - math.log(2)) > 0.01:
        raise RuntimeError(
            f"{name} begins with a loss of {run.first_loss:.4f}: policy and reference "
            "differ before the first step"
        )


def check_head(name: str, run: Run) -> None:
    """That a rival took the head it is named for: the chunked one makes no logits.

    Raises:
        RuntimeError: Names the contender.
    """
    if name == "dpo-chunked" and run.logits_bytes:
        raise RuntimeError(
            f"{name} made logits of {run.logits_bytes:,} bytes: the chunked head was "
            "not used"
        )
    if name == "dpo" and not run.logits_bytes:
        raise RuntimeError(f"{name} made no logits: it is not the plain head")


def check_same_work(runs: dict[str, list[Run]]) -> None:
    """That all contenders trained as many pairs, steps and tokens as the first.

    Raises:
        RuntimeError: Names the contenders.
    """
    base = next(iter(runs))
    for name, own in runs.items():
        for run in own:
            if run.work() != runs[base][0].work():
                raise RuntimeError(
                    f"{name} and {base} did not train the same thing: {run.work()} "
                    f"against {runs[base][0].work()}"
                )


# --- report ----------------------------------------------------------------------


def headings(baseline: str) -> tuple[str, ...]:
    """Of the table's columns."""
    return (
        "data",
        "pairs",
        f"contender, relative to {baseline}",
        "pairs per second",
        "step time",
        "CPU time",
        "peak memory",
        "beyond the imports",
        "note",
    )


def ratio(own: list[Run], other: list[Run], key: str) -> float:
    """Of what the runs of two contenders reported, the median over turns."""
    pairs = zip(own, other, strict=True)
    return statistics.median(getattr(a, key) / getattr(b, key) for a, b in pairs)


def memory_cell(own: list[Run], baseline: list[Run], key: str) -> str:
    """The largest of what the runs reported, relative to the baseline's, and in GiB."""
    most, base = (max(getattr(run, key) for run in runs) for runs in (own, baseline))
    return f"{most / base:.2f} ×, {most / GIB:.2f} GiB"


def table_rows(
    data: str, runs: dict[str, list[Run]], fillings: dict[str, Filling]
) -> list[str]:
    """A row per contender, the baseline first; absolute times of a GPU only."""
    baseline = next(iter(runs.values()))
    rows = []
    for name, own in runs.items():
        best = min(own, key=lambda run: run.seconds)
        notes = [best.speed()] * ON_GPU + [best.evidence()]
        if name in fillings:
            notes.append(fillings[name].note(own, baseline))
        cells = (
            data,
            best.pairs,
            name,
            f"{ratio(baseline, own, 'seconds'):.1f} ×",
            f"{ratio(own, baseline, 'step_seconds'):.2f} ×",
            f"{ratio(own, baseline, 'cpu_seconds'):.2f} ×",
            memory_cell(own, baseline, "peak_bytes"),
            memory_cell(own, baseline, "extra_bytes"),
            "; ".join(notes),
        )
        rows.append(row(*cells))
    return rows


def table(headings: Sequence[str], rows: list[str]) -> str:
    """A markdown table."""
    return "\n".join([row(*headings), row(*["---"] * len(headings)), *rows])


def row(*cells: object) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def model_text(args: argparse.Namespace) -> str:
    """Which model is trained."""
    if not args.model:
        return (
            f"Random Llama, hidden {args.hidden}, {args.layers} layers, "
            f"vocabulary {args.vocab}"
        )
    config = AutoConfig.from_pretrained(args.model).get_text_config()
    return (
        f"{args.model.resolve().name} ({config.model_type}), hidden "
        f"{config.hidden_size}, {config.num_hidden_layers} layers, vocabulary "
        f"{config.vocab_size}"
    )


def head_share(
    config: PreTrainedConfig, tokens: int, scored: int, args: argparse.Namespace
) -> float:
    """The head's share of a step's matrix products, without a cache.

        head    scored tokens × vocabulary × hidden × 3, or 4 where it trains
        body    tokens × weights of its linear layers × 4 (policy and reference, 2 for
                backward), or 3 with an adapter; 1 more with checkpointing

    Left out are products of attention with itself and of an adapter.

    Args:
        config: Of the model.
        tokens: Of all sequences: each prompt twice, as where it is not shared.
        scored: Of these, the ones that go through the head.
        args: Whether all weights train, and whether layers are checkpointed.
    """
    # not above: a run of `rl: dpo` imports this file, and nothing of this package
    from axolotl_edpo.tools.model_sizes import sizes_of

    sizes, trains = sizes_of(config), not args.adapter
    head = scored * sizes.head * (4 if trains else 3)
    body = tokens * sizes.linear * (3 + trains + args.gradient_checkpointing)
    return head / (head + body)


def share_text(data: str, model: Path, run: Run, args: argparse.Namespace) -> str:
    """The head's share, of the tokens that a run trained."""
    config = AutoConfig.from_pretrained(model)
    share = head_share(config, run.tokens, run.scored, args)
    return f"{share:.1%} ({data})"


def data_text(args: argparse.Namespace) -> str:
    """How the pairs are read, and how many are in a batch."""
    parts = [f"dataset type {args.type}"] if args.type else []
    parts += [f"{key}: {value}" for key, value in args.field]
    parts += [
        f"sequence_len {args.sequence_len}",
        f"{args.micro_batch} pairs per micro-batch",
        f"{args.accumulation} micro-batches per step",
    ]
    return "; ".join(parts)


def description(args: argparse.Namespace, shares: list[str]) -> str:
    """The header line and what was trained, with the head's share of it."""
    header = environment("torch", "transformers", "trl", "axolotl", "axolotl-edpo")
    settings = [
        model_text(args),
        "bfloat16" if ON_GPU else "float32",
        "LoRA, rank 16" if args.adapter else "full fine-tuning",
        f"attention {args.attention}",
        f"gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}",
        data_text(args),
        "one epoch",
    ]
    memory = "allocated on the GPU" if ON_GPU else "resident set of the process"
    return (
        f"{header}\n\n{'; '.join(settings)}. The head's share of the matrix products: "
        f"{', '.join(shares)}. All is relative to `{args.baseline}`, median over "
        f"repeats ({args.repeats}). Pairs per second: of training without loading and "
        f"tokenizing. Step time: without the first step and what comes before; CPU "
        f"time: of all threads, likewise. Memory: {memory}; beyond the imports: what "
        f"was not in use before the first model was loaded.\n\n{LEGEND}"
    )


@contextlib.contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    """A new folder: in `parent`, where it stays, or a temporary one."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="benchmark_", dir=parent.resolve()))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def sources(args: argparse.Namespace) -> list[tuple[str, list[dict]]]:
    """Name and pairs of all data files, or of the synthetic pairs."""
    if args.data:
        return [(path.stem, read_pairs(path, args.pairs)) for path in args.data]
    return [("synthetic", synthetic_pairs(args.pairs or SYNTHETIC_PAIRS, args.vocab))]


def benchmark(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The rows of all data, and the head's share with each."""
    found = sources(args)
    rows, shares = [], []
    with workspace(args.work) as folder:
        everything = [pair for _, pairs in found for pair in pairs]
        model = base_model(folder / "model", everything, args)
        for number, (name, pairs) in enumerate(found):
            own = folder / f"{number}_{name}"
            recipes = write_recipes(own, model, pairs, args)
            runs, fillings = take_turns(name, recipes, args)
            rows += table_rows(name, runs, fillings)
            shares.append(share_text(name, model, runs[args.baseline][0], args))
    return rows, shares


# --- options ---------------------------------------------------------------------


def field(text: str) -> tuple[str, Any]:
    """A `key=value` of the command line; the value is YAML."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key, yaml.safe_load(value)


def contenders(text: str) -> list[str]:
    """Contenders of the command line."""
    names = text.split(",")
    if unknown := sorted(set(names) - CONTENDERS.keys()):
        known = ", ".join(CONTENDERS)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {known}")
    return names


def in_order(names: list[str], baseline: str) -> list[str]:
    """Contenders in the order of the table, the baseline first, named or not."""
    return [baseline, *(n for n in CONTENDERS if n in names and n != baseline)]


def lacks_liger(least: str = LIGER_KERNEL_MIN_VERSION) -> str:
    """Why the chunked head cannot run here; nothing where it can."""
    if is_liger_kernel_available(least):
        return ""
    return f"dpo-chunked: TRL asks for liger-kernel {least} or newer"


def data_parser(story: str | None) -> argparse.ArgumentParser:
    """The options that say which pairs are read and how."""
    parser = argparse.ArgumentParser(description=(story or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, action="append", default=[], help="JSON lines; repeatable")
    add("--pairs", type=int, help="of a file; None: all (default: %(default)s)")
    add("--type", help="axolotl dataset type of the files; default: by their fields")
    add(
        "--field",
        type=field,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further key of `datasets:`, as field_messages=prompt; repeatable",
    )
    add("--model", type=Path, help="folder of a model and its tokenizer")
    add("--vocab", type=int, default=32000, help="vocabulary without --model")
    add("--sequence-len", type=int, default=2048, help="longest sequence in tokens")
    add("--micro-batch", type=int, default=4, help="pairs per micro-batch")
    add("--accumulation", type=int, default=2, help="micro-batches per step")
    add("--work", type=Path, help="keeps models, recipes and logs in a folder here")
    add("--write", action="store_true", help="also into benchmarks/RESULTS.md")
    return parser


def parse_args() -> argparse.Namespace:
    """The options of the command line."""
    parser = data_parser(__doc__)
    parser.set_defaults(pairs=48)
    add = parser.add_argument
    lacks = lacks_liger()
    usual = [name for name in DEFAULT if not (lacks and name == "dpo-chunked")]
    help = f"default: {', '.join(usual)}; there are also {', '.join(MORE)}"
    add("--contenders", type=contenders, default=usual, help=help)
    help = "all are relative to it (default: %(default)s)"
    rival = "dpo" if lacks else "dpo-chunked"
    add("--baseline", choices=list(CONTENDERS), default=rival, help=help)
    add("--before", type=Path, help="another checkout, to compare with")
    add("--adapter", choices=["lora"], help="default: full fine-tuning")
    add("--attention", default="sdpa", help="attn_implementation")
    add("--gradient-checkpointing", action="store_true", help="for all contenders")
    add("--repeats", type=int, default=1, help="runs of each contender")
    add("--threads", type=int, default=2, help="OMP_NUM_THREADS of a run")
    add("--hidden", type=int, default=256, help="hidden size without --model")
    add("--layers", type=int, default=6, help="number of layers without --model")
    args = parser.parse_args()
    args.contenders = in_order(args.contenders, args.baseline)
    if lacks and "dpo-chunked" in args.contenders:
        parser.error(lacks)
    return args


def main() -> None:
    """Measures, prints the table and, if asked, writes it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    rows, shares = benchmark(args)
    text = f"{description(args, shares)}\n\n{table(headings(args.baseline), rows)}"
    print(f"\n{text}")
    if args.write:
        append_results(section(args), text)


def section(args: argparse.Namespace) -> str:
    """The title in RESULTS.md, where a section replaces the one of its title."""
    parts = ["Training run on a GPU" if ON_GPU else "Training run on a CPU"]
    parts += [args.model.resolve().name] if args.model else []
    parts += ["LoRA"] if args.adapter else []
    if args.baseline not in RIVALS:
        shape = f"hidden {args.hidden}, vocabulary {args.vocab}"
        parts += [] if args.model else [shape]
        parts.append(f"relative to {args.baseline}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
