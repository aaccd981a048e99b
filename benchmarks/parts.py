"""Where the time of a training step goes, part by part, on a core of its own.

    python benchmarks/parts.py --data a.jsonl --data b.jsonl --write

Trains `rl: edpo` and axolotl's `rl: dpo` with its chunked head as train_step.py does,
on a CPU, with torch's profiler around the steps after the first:

    head, products      matrix products of the head op, forward and backward
    head, the rest      all else in it
    body, products      matrix products of the layers, forward and backward
    attention           SDPA's kernels
    body, the rest      all other operators
    optimizer           its step
    host                what was in no operator: Python, data, autograd

Times are relative to the whole step of the first contender on the same data. The
profiler itself slows the host down, so its part is an upper bound.
"""

import argparse
import json
import re
from collections import Counter
from time import perf_counter
from typing import Any

import torch
import train_step
from axolotl.integrations.base import BasePlugin
from measure import append_results, environment
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

PARTS = (
    "head, products",
    "head, the rest",
    "body, products",
    "attention",
    "body, the rest",
    "optimizer",
    "host",
)
# autograd functions of the two heads, and their backwards
HEADS = re.compile("_TokenStats|_ChunkedLogProb")
PRODUCT = re.compile(r"^aten::(mm|addmm_?|bmm|baddbmm)$")
STEPS = 2


def part_of(event: Any) -> str:
    """Which part an event's own time belongs to."""
    names = [event.name]
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    if not names[0].startswith("aten::"):
        return "host"
    if any(name.startswith("Optimizer.step") for name in names):
        return "optimizer"
    if "scaled_dot_product" in names[0]:
        return "attention"
    where = "head" if any(map(HEADS.search, names)) else "body"
    return f"{where}, products" if PRODUCT.match(names[0]) else f"{where}, the rest"


class Recorder(TrainerCallback):
    """Profiles STEPS steps, the second and those after it, and prints their parts."""

    def on_step_end(self, args, state, control, **kwargs):
        """Starts the profile after the first step; ends and prints it STEPS later."""
        if state.global_step == 1:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()
            self._began = perf_counter()
        elif state.global_step == 1 + STEPS:
            spent = perf_counter() - self._began
            self._profile.stop()
            found: Counter[str] = Counter()
            for event in self._profile.events():
                found[part_of(event)] += event.self_cpu_time_total / 1e6
            # what no operator took
            found["host"] = spent - sum(
                seconds for part, seconds in found.items() if part != "host"
            )
            print({"parts": json.dumps({"all": spent, **found})})


class Parts(BasePlugin):
    """Records the parts of a run."""

    def get_training_args(self, cfg) -> dict[str, Any] | None:
        """As `train_step.Probe`: no Triton kernels in the layers on a CPU."""
        return train_step.Probe.get_training_args(self, cfg)  # type: ignore[arg-type]

    def post_trainer_create(self, cfg, trainer) -> None:
        """Adds the recorder."""
        trainer.add_callback(Recorder())


def parts(name: str, recipes: dict, env: dict[str, str]) -> dict[str, float]:
    """Seconds of each part of a contender's steps."""
    path = recipes[name]
    text = path.read_text().replace(train_step.PROBE, "parts.Parts")
    path.write_text(text)
    command = ["train", str(path), "--launcher", "python"]
    output, _ = train_step.run_axolotl(command, path.with_suffix(".log"), env)
    return reported(output)


def reported(output: str) -> dict[str, float]:
    """Seconds of each part, and of all, that a run printed."""
    (found,) = re.findall(r"\{'parts': '(.*)'\}", output)
    return json.loads(found)


def rows(data: str, found: dict[str, dict[str, float]]) -> list[str]:
    """A row per contender, relative to the first one's whole."""
    whole = next(iter(found.values()))["all"]
    return [
        train_step.row(
            data,
            name,
            f"{1 / (seconds['all'] / whole):.2f} ×",
            *(f"{seconds.get(part, 0.0) / whole:.3f}" for part in PARTS),
        )
        for name, seconds in found.items()
    ]


def main() -> None:
    """Measures, prints the table and, if asked, writes it."""
    parser = train_step.data_parser(__doc__)
    parser.set_defaults(pairs=8 * (1 + STEPS), adapter=None)
    parser.set_defaults(attention="sdpa", gradient_checkpointing=False, before=None)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--contenders",
        type=train_step.contenders,
        default=["dpo-chunked", "shared", "cached"],
        help="the first is what all are relative to (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = []
    for name, pairs in train_step.sources(args):
        table += rows(name, measured(name, pairs, args))
    text = f"{description(args)}\n\n{train_step.table(headings(args), table)}"
    print(f"\n{text}")
    if args.write:
        append_results("Parts of a step on a CPU", text)


def measured(data: str, pairs: list[dict], args: argparse.Namespace) -> dict:
    """The parts of every contender on some pairs."""
    with train_step.workspace(args.work) as folder:
        model = train_step.base_model(folder / "model", pairs, args)
        recipes = train_step.write_recipes(folder / "runs", model, pairs, args)
        env = train_step.child_environment(folder / "cache", args.threads)
        found = {}
        for name in args.contenders:
            print(f"{data}: {name} ...", flush=True)
            found[name] = parts(name, recipes, env)
        return found


def headings(args: argparse.Namespace) -> list[str]:
    """Of the table's columns."""
    return ["data", "contender", f"speed, relative to {args.contenders[0]}", *PARTS]


def description(args: argparse.Namespace) -> str:
    """The header line and what was trained."""
    header = environment("torch", "transformers", "trl", "axolotl", "axolotl-edpo")
    return (
        f"{header}\n\n{train_step.model_text(args)}; float32; full fine-tuning; "
        f"{train_step.data_text(args)}; {STEPS} steps after the first. "
        f"Parts are relative to the whole step of `{args.contenders[0]}`."
    )


if __name__ == "__main__":
    main()
