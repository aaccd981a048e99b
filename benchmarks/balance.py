"""How evenly the tokens of an optimizer step are spread over its micro-batches.

    python benchmarks/balance.py                     # synthetic pairs
    python benchmarks/balance.py --data a.jsonl --data b.jsonl --write

Of every step of one epoch over the whole file, in random order: the largest micro-batch
divided by the mean of the step's micro-batches, in tokens. 1 is even; on several ranks
and in memory the largest is what counts. Three ways to lay the same pairs out:

    as drawn                 one pair after the other, without padding
    dealt                    by `PairCollator.balance`, as with `sample_packing: true`
    dealt, prompts shared    the same, each prompt in its row once

Nothing is trained. The tokens are those of a run: axolotl builds the trainer, and its
data set and its collator are used. The model is one layer, as tokens do not depend on
it; `--model` is asked for its tokenizer only.
"""

import argparse
import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import datasets
import torch
import train_step
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import setup_model_and_trainer
from measure import append_results, environment
from transformers import AutoTokenizer

from axolotl_edpo.data.collator import PairCollator

HEADINGS = ("data", "pairs", "steps", "order", "largest / mean, median", "worst step")


@dataclass(frozen=True)
class Order:
    """A way to lay the pairs of a step out.

    Attributes:
        deals: Whether the step's pairs are dealt anew over its micro-batches.
        shares: Whether each prompt is in its row once.
    """

    deals: bool
    shares: bool


ORDERS = {
    "as drawn": Order(deals=False, shares=False),
    "dealt": Order(deals=True, shares=False),
    "dealt, prompts shared": Order(deals=True, shares=True),
}


def model_keys(
    folder: Path, pairs: list[dict], args: argparse.Namespace
) -> dict[str, Any]:
    """A small random model for the tokenizer that `train_step` would take."""
    tokenizer = args.model.resolve() if args.model else folder / "tokenizer"
    if not args.model:
        train_step.make_tokenizer(pairs, args.vocab).save_pretrained(tokenizer)
    vocab = len(AutoTokenizer.from_pretrained(tokenizer))
    train_step.save_llama(folder / "model", vocab, 32, 1, args.sequence_len)
    return {"base_model": str(folder / "model"), "tokenizer_config": str(tokenizer)}


def build_trainer(
    folder: Path, keys: dict[str, Any], pairs: list[dict], args: argparse.Namespace
) -> Any:
    """The trainer of a recipe with packing, built as `axolotl train` builds it."""
    folder.mkdir()
    data = train_step.dataset(folder / "pairs.jsonl", pairs, args)
    recipe = {
        **train_step.base_recipe(folder, data, args),
        **train_step.CONTENDERS["packed"],
        **keys,
        "plugins": ["axolotl_edpo.EDPOPlugin"],
        "attn_implementation": "sdpa",
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    cfg = load_cfg(str(path))
    return setup_model_and_trainer(cfg, load_preference_datasets(cfg=cfg))[0]


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """Runs of items; the last may be shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))


def steps_of_epoch(
    dataset: Sequence[dict], micro_batch: int, accumulation: int
) -> Iterator[list[list[dict]]]:
    """The micro-batches of each optimizer step of an epoch, in random order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    drawn = [[dataset[pair] for pair in batch] for batch in chunks(order, micro_batch)]
    return (list(step) for step in chunks(drawn, accumulation))


def tokens(
    step: list[list[dict]], collator: PairCollator, order: Order
) -> Sequence[int]:
    """Tokens in the row of each micro-batch of a step."""
    collator = replace(collator, packs=True, shares=order.shares)
    rows = collator.balance(step) if order.deals else map(collator, step)
    return [row["input_ids"].numel() for row in rows]


def imbalances(trainer: Any, order: Order, args: argparse.Namespace) -> list[float]:
    """Largest micro-batch divided by the mean of its step, for every step."""
    steps = steps_of_epoch(trainer.train_dataset, args.micro_batch, args.accumulation)
    sizes = [tokens(step, trainer.batcher.collators["train"], order) for step in steps]
    return [max(own) / statistics.mean(own) for own in sizes]


def table_rows(data: str, trainer: Any, args: argparse.Namespace) -> list[str]:
    """A row for each way to lay the pairs out."""
    rows = []
    for name, order in ORDERS.items():
        found = imbalances(trainer, order, args)
        ratios = (f"{statistics.median(found):.3f}", f"{max(found):.3f}")
        count = len(trainer.train_dataset)
        rows.append(train_step.row(data, count, len(found), name, *ratios))
    return rows


def benchmark(args: argparse.Namespace) -> list[str]:
    """The rows of all data."""
    found = train_step.sources(args)
    rows = []
    with train_step.workspace(args.work) as folder:
        datasets.config.HF_DATASETS_CACHE = folder / "cache"  # goes with the folder
        everything = [pair for _, pairs in found for pair in pairs]
        keys = model_keys(folder, everything, args)
        for number, (name, pairs) in enumerate(found):
            trainer = build_trainer(folder / f"{number}_{name}", keys, pairs, args)
            rows += table_rows(name, trainer, args)
    return rows


def description(args: argparse.Namespace) -> str:
    """The header line and how the pairs were read."""
    header = environment("torch", "transformers", "trl", "axolotl", "axolotl-edpo")
    tokenizer = f"byte-level BPE of {args.vocab}, learned from the data"
    if args.model:
        tokenizer = f"that of {args.model.resolve().name}"
    settings = [f"Tokenizer: {tokenizer}", train_step.data_text(args), "one epoch"]
    return f"{header}\n\n{'; '.join(settings)}."


def main() -> None:
    """Counts, prints the table and, if asked, writes it."""
    parser = train_step.data_parser(__doc__)
    parser.set_defaults(accumulation=8)
    args = parser.parse_args()
    logging.disable(logging.INFO)  # axolotl's, the whole config among it
    rows = benchmark(args)
    text = f"{description(args)}\n\n{train_step.table(HEADINGS, rows)}"
    print(f"\n{text}")
    if args.write:
        append_results("Tokens of a step over its micro-batches", text)


if __name__ == "__main__":
    main()
