"""What it costs to check every pair: preparing data under `rl: edpo` and `rl: dpo`.

    python benchmarks/prepare.py --data a.jsonl --data b.jsonl --write

axolotl prepares the same data under either in turn, each time anew, in this process:
types, chat template, lengths. CPU seconds of this process per 10,000 pairs, without
saving, which a process of its own does, and without tokenizing, which TRL does later.
"""

import argparse
import logging
import os
import shutil
import statistics
from pathlib import Path
from time import process_time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import balance
import datasets
import train_step
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from measure import append_results, environment

HEADINGS = ("data", "pairs", "`rl`", "CPU s per 10,000 pairs", "relative to dpo")
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "edpo": {"plugins": ["axolotl_edpo.EDPOPlugin"]},
}


def seconds(folder: Path, recipe: dict[str, Any]) -> tuple[int, float]:
    """Prepares the data of a recipe once.

    Returns:
        How many pairs there are, and CPU seconds.
    """
    prepared = folder / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    cfg = load_cfg(str(path))
    cfg.dataset_num_proc = None  # this process
    began = process_time()
    pairs = len(load_preference_datasets(cfg=cfg).train_dataset)
    return pairs, process_time() - began


def table_rows(name: str, found: dict[str, list[tuple[int, float]]]) -> list[str]:
    """A row for each method.

    Args:
        name: Name of the data.
        found: Method -> pairs and seconds of each turn.
    """
    rows = []
    for method, turns in found.items():
        pairs = turns[0][0]
        per_10k = statistics.median(1e4 * time / pairs for _, time in turns)
        ratio = statistics.median(
            ours[1] / dpo[1] for ours, dpo in zip(turns, found["dpo"], strict=True)
        )
        cells = name, pairs, method, f"{per_10k:.1f}", f"{ratio:.2f} ×"
        rows.append(train_step.row(*cells))
    return rows


def benchmark(args: argparse.Namespace) -> list[str]:
    """The rows of all data."""
    rows = []
    sources = train_step.sources(args)
    with train_step.workspace(args.work) as folder:
        datasets.disable_caching()
        everything = [pair for _, pairs in sources for pair in pairs]
        keys = balance.model_keys(folder, everything, args)
        for name, pairs in sources:
            data = train_step.dataset(folder / f"{name}.jsonl", pairs, args)
            base = train_step.base_recipe(folder, data, args) | keys
            found: dict[str, list[tuple[int, float]]] = {
                method: [] for method in METHODS
            }
            for turn in range(args.repeats + 1):  # the first is not counted
                for method, more in METHODS.items():
                    time = seconds(folder, {**base, "rl": method, **more})
                    found[method] += [time] if turn else []
            rows += table_rows(name, found)
    return rows


def main() -> None:
    """Measures, prints the table and, if asked, writes it."""
    parser = train_step.data_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = benchmark(args)
    header = environment("transformers", "trl", "axolotl", "axolotl-edpo")
    text = f"{header}\n\n{train_step.data_text(args)}.\n\n"
    text += train_step.table(HEADINGS, rows)
    print(f"\n{text}")
    if args.write:
        append_results("Preparing data", text)


if __name__ == "__main__":
    main()
