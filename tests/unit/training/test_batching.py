"""batching.py: the pairs that accelerate repeats, on two ranks over gloo."""

import json
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers import processes, ranks
from torch.utils.data import DataLoader

from axolotl_edpo.data.collator import PairCollator, keep_examples
from axolotl_edpo.data.layout import LayoutSettings
from axolotl_edpo.training.batching import PairBatcher

# Pairs of the data, in micro-batches of 2 on each of two ranks, and what each rank has
# of them. accelerate fills the last micro-batches up with the first pairs.
CASES = {
    5: [[[0, 1], [4]], [[2, 3], []]],
    7: [[[0, 1], [4, 5]], [[2, 3], [6]]],
    8: [[[0, 1], [4, 5]], [[2, 3], [6, 7]]],
}


def read(source, count):
    return [*islice(source, count)], None


def numbers(batch) -> list[int]:
    return [pair["prompt_ids"][0] for pair in batch["examples"].pairs]


def lay_out(rank: int, port: int, folder: Path) -> None:
    """Writes what a rank has of a step and of an evaluation, and the pairs of all."""
    ranks.become(rank, 2, port)
    accelerator = Accelerator(cpu=True)
    cpu, result = torch.device("cpu"), []
    collator = partial(PairCollator, pad_token_id=0)
    batcher = PairBatcher(accelerator, collator, LayoutSettings(), cpu, False)
    for count in CASES:
        pairs = [
            {"prompt_ids": [number], "chosen_ids": [1], "rejected_ids": [2]}
            for number in range(count)
        ]
        loader = accelerator.prepare(
            DataLoader(pairs, batch_size=2, collate_fn=keep_examples)
        )
        step = batcher.step(iter(loader), 2, read, has_next=False)
        trained = [numbers(batch) for batch in step]
        evaluated = [numbers(batcher.evaluation_batch(raw)) for raw in loader]
        result.append([trained, evaluated, int(batcher.count(step)[0])])
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def test_no_rank_trains_or_evaluates_a_pair_that_fills_up_the_last_micro_batches(
    tmp_path,
):
    processes.run(lay_out, processes.free_port(), tmp_path, count=2)
    for rank, result in enumerate(ranks.results(tmp_path)):
        own = [by_rank[rank] for by_rank in CASES.values()]
        assert result == [
            [pairs, pairs, count] for pairs, count in zip(own, CASES, strict=True)
        ]
