"""A training run of `rl: edpo` against one of `rl: dpo` on the same padded batches.

    python benchmarks/train_step.py                  # synthetic pairs
    python benchmarks/train_step.py --data a.jsonl --data b.jsonl --write
    python benchmarks/train_step.py --adapter lora --repeats 3

A random Llama is trained for one epoch on the first `--pairs` pairs of each file, by
`axolotl train` in a process of its own; contenders take turns. Measured are the
trainer's own `train_runtime`, which begins after loading and tokenizing, and the most
memory in use: the resident set of the whole process (Python and its libraries are about
1 GiB of it), or what torch allocated on the GPU. With β 0.1 the first loss of both runs
must be log 2 = 0.6931, and the batches of both hold the same number of tokens.

A file has one pair per line. `chosen` and `rejected` are lists of messages: whole
conversations or, in files with a `prompt`, the answers to it. Synthetic pairs are
random words with the lengths of the test split of harmless-base of Anthropic's hh-rlhf.

Two things to know when reading the times. axolotl's DPO trainer collects garbage and
empties the GPU's cache after every micro-batch, which `rl: edpo` leaves out: some
tenths of a second each on a CPU, much for a small model. And the first run on a GPU
compiles kernels: use `--repeats 3` there.
"""

import argparse
import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from axolotl.integrations.base import BasePlugin
from measure import append_results, environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTENDERS = ("edpo", "dpo")
ON_GPU = torch.cuda.is_available()
GIB = 2**30
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
# tokens of hh-rlhf's harmless-base, test split; medians of the answers follow from
# their ratio to the mean in words
TOKENS_MEAN_MEDIAN = {"prompt": (108, 76), "chosen": (42, 29), "rejected": (52, 36)}
TOKENS_LONGEST = 836
HEADINGS = (
    "data",
    "pairs",
    "rl",
    "time, relative to dpo",
    "peak memory, relative to dpo",
    "peak memory (GiB)",
    "note",
)


@dataclass(frozen=True)
class Run:
    """What one training run reported.

    Attributes:
        seconds: `train_runtime`.
        peak_bytes: Most memory in use.
        first_loss: Loss of the first optimizer step.
        steps: Optimizer steps.
        tokens: Tokens of all batches, padding apart, to four digits.
    """

    seconds: float
    peak_bytes: int
    first_loss: float
    steps: int
    tokens: float

    def evidence(self) -> str:
        """What shows that the contenders train the same thing."""
        return (
            f"loss of step 1: {self.first_loss:.4f}; "
            f"{self.steps} steps, {self.tokens:,.0f} tokens"
        )

    def seconds_per_step(self) -> str:
        """The time, which depends on the machine."""
        return f"{self.seconds:.2f} s, {self.seconds / self.steps:.3f} s per step"


class PeakMemory(BasePlugin):
    """Lets a run print the most memory torch allocated on the GPU."""

    def post_train(self, cfg, model) -> None:
        """After the last optimizer step; 0 without a GPU."""
        print({"peak_gpu_bytes": torch.cuda.max_memory_allocated()})


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


def read_pairs(path: Path, count: int) -> list[dict]:
    """The first pairs of a file."""
    with path.open() as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def dataset(path: Path, pairs: list[dict]) -> dict:
    """Writes the pairs; returns the entry of `datasets:` that reads them."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    entry = {"path": str(path), "ds_type": "json", "split": "train"}
    if "prompt" not in pairs[0]:
        return {**entry, "type": "chat_template.argilla_chat"}
    return {**entry, "type": "chat_template.default", "field_messages": "prompt"}


# --- model and recipe --------------------------------------------------------------


def make_tokenizer(pairs: list[dict], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, learned from the pairs and from random words."""
    answers = [pair[part] for pair in pairs for part in ("chosen", "rejected")]
    texts = [message["content"] for messages in answers for message in messages]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, " ".join(random_words(vocab))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special
    )


def save_model(folder: Path, pairs: list[dict], args: argparse.Namespace) -> None:
    """A random Llama and its tokenizer, ready for `base_model`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(pairs, args.vocab).save_pretrained(folder)


def recipe(rl: str, folder: Path, model: Path, data: dict, adapter: str | None) -> dict:
    """The recipe of a contender."""
    probe = "train_step.PeakMemory"
    keys = {
        "base_model": str(model),
        "rl": rl,
        "rl_beta": 0.1,
        "plugins": [probe],
        "chat_template": "tokenizer_default",
        "datasets": [data],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / f"out_{rl}"),
        "sequence_len": 2048,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "attn_implementation": "sdpa",
        "bf16": ON_GPU,
        "tf32": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
    }
    if rl == "edpo":
        keys["plugins"] = [probe, "axolotl_edpo.EDPOPlugin"]
        keys["edpo_epsilon"] = 0.01
    if adapter == "lora":
        keys |= {"adapter": "lora", "lora_r": 16, "lora_alpha": 32}
        keys["lora_target_linear"] = True
    return keys


# --- runs ------------------------------------------------------------------------


def child_environment(cache: Path, threads: int) -> dict[str, str]:
    """One device, no network, this folder importable, a cache that goes with it."""
    search = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
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
    output, resident = run_axolotl(command, path.with_suffix(".log"), env)
    losses = logged(output, "loss")
    return Run(
        seconds=logged(output, "train_runtime")[-1],
        peak_bytes=int(logged(output, "peak_gpu_bytes")[-1]) or resident,
        first_loss=losses[0],
        steps=len(losses),
        tokens=logged(output, "num_tokens")[-1],
    )


def take_turns(
    name: str, recipes: dict[str, Path], args: argparse.Namespace
) -> dict[str, list[Run]]:
    """Trains the contenders in turn, after tokenizing for all of them."""
    folder = recipes["dpo"].parent
    env = child_environment(folder / "cache", args.threads)
    run_axolotl(["preprocess", str(recipes["dpo"])], folder / "preprocess.log", env)
    runs: dict[str, list[Run]] = {rl: [] for rl in recipes}
    for repeat in range(args.repeats):
        for rl, path in recipes.items():
            print(
                f"{name}: rl: {rl}, run {repeat + 1} of {args.repeats} ...", flush=True
            )
            run = train(path, env)
            gib = f"{run.peak_bytes / GIB:.2f} GiB"
            print(f"  {run.seconds_per_step()}; {gib}; {run.evidence()}", flush=True)
            runs[rl].append(run)
    return runs


def write_recipes(
    folder: Path, model: Path, pairs: list[dict], adapter: str | None
) -> dict[str, Path]:
    """The pairs and the recipes of all contenders."""
    folder.mkdir()
    data = dataset(folder / "pairs.jsonl", pairs)
    recipes = {rl: folder / f"{rl}.yml" for rl in CONTENDERS}
    for rl, path in recipes.items():
        path.write_text(yaml.safe_dump(recipe(rl, folder, model, data, adapter)))
    return recipes


# --- report ----------------------------------------------------------------------


def table_rows(name: str, pairs: int, runs: dict[str, list[Run]]) -> list[str]:
    """A row per contender; absolute times of a GPU only."""
    peaks = {rl: max(run.peak_bytes for run in runs[rl]) for rl in runs}
    rows = []
    for rl, own in runs.items():
        ratios = [
            run.seconds / base.seconds
            for run, base in zip(own, runs["dpo"], strict=True)
        ]
        best = min(own, key=lambda run: run.seconds)
        cells = (
            name,
            pairs,
            rl,
            f"{statistics.median(ratios):.2f}",
            f"{peaks[rl] / peaks['dpo']:.2f}",
            f"{peaks[rl] / GIB:.2f}",
            f"{best.seconds_per_step()}; " * ON_GPU + best.evidence(),
        )
        rows.append(row(*cells))
    return rows


def row(*cells: object) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def description(args: argparse.Namespace) -> str:
    """The header line and what was trained."""
    header = environment("torch", "transformers", "trl", "axolotl", "axolotl-edpo")
    kind = "LoRA, rank 16" if args.adapter else "full fine-tuning"
    dtype = "bfloat16" if ON_GPU else "float32"
    memory = "allocated on the GPU" if ON_GPU else "resident set of the process"
    return (
        f"{header}\n\n"
        f"Random Llama, hidden {args.hidden}, {args.layers} layers, vocabulary "
        f"{args.vocab}; {dtype}; {kind}; 4 pairs per micro-batch, 2 micro-batches per "
        f"step, one epoch. Time: training without loading and tokenizing, median over "
        f"repeats ({args.repeats}). Memory: {memory}."
    )


@contextlib.contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    """A new folder: in `parent`, where it stays, or a temporary one."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="train_step_", dir=parent.resolve()))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def benchmark(args: argparse.Namespace) -> list[str]:
    """The rows of all data files, or of the synthetic pairs."""
    sources = [(path.stem, read_pairs(path, args.pairs)) for path in args.data]
    if not sources:
        sources = [("synthetic", synthetic_pairs(args.pairs, args.vocab))]
    rows = []
    with workspace(args.work) as folder:
        model = folder / "model"
        save_model(model, [pair for _, pairs in sources for pair in pairs], args)
        for number, (name, pairs) in enumerate(sources):
            own = folder / f"{number}_{name}"
            recipes = write_recipes(own, model, pairs, args.adapter)
            rows += table_rows(name, len(pairs), take_turns(name, recipes, args))
    return rows


def parse_args() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, action="append", default=[], help="JSON lines; repeatable")
    add("--pairs", type=int, default=48, help="pairs taken of each file")
    add("--adapter", choices=["lora"], help="default: full fine-tuning")
    add("--repeats", type=int, default=1, help="runs of each contender")
    add("--threads", type=int, default=2, help="OMP_NUM_THREADS of a run")
    add("--hidden", type=int, default=256, help="hidden size")
    add("--layers", type=int, default=6, help="number of layers")
    add("--vocab", type=int, default=32000, help="vocabulary size")
    add("--work", type=Path, help="keeps models, recipes and logs in a folder here")
    add("--write", action="store_true", help="also into benchmarks/RESULTS.md")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table and, if asked, writes it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    table = [row(*HEADINGS), row(*["---"] * len(HEADINGS)), *benchmark(args)]
    text = "\n".join([description(args), "", *table])
    print(f"\n{text}")
    if args.write:
        place = "on a GPU" if ON_GPU else "on a CPU"
        adapter = ", LoRA" if args.adapter else ""
        append_results(f"Training run {place}{adapter}", text)


if __name__ == "__main__":
    main()
