"""`ScoreRows`: a row per evaluated pair, of all ranks, in one Parquet file.

Columns: those of `training/pair_trace.py`, and

    chosen_reward, rejected_reward    whose difference is `margin`
    loss                              preference loss, without `sft` and router loss
    set                               name of its set of `test_datasets:`; null if there
                                      are fewer than two

`global_step` is the last step of the trained model, in all rows. The summary is in the
file's metadata, as JSON.

Each rank writes part files, as it writes a trace, to a hidden folder beside the file.
At the end the first rank joins them under a temporary name, and renames that.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..background import on_device
from ..data.evaluation_sets import SET
from ..data.layout import Batch
from ..ops.token_stats import TokenStats
from ..run_files import SCORES, TRACE, TRACE_FILES
from ..training.assembly import make_trace
from ..training.pair_outcomes import PairOutcomes, traced_values

MORE = ("chosen_reward", "rejected_reward", "loss", "set")


class ScoreRows:
    """Collects the rows of one evaluation.

    Args:
        file: The Parquet file.
        trainer: The `EDPOTrainer`.
    """

    def __init__(self, file: Path, trainer: Any):
        self._file, self._accelerator = file, trainer.accelerator
        self._parts = file.with_name(f".{file.name}.parts")
        collator = trainer.batcher.collators["eval"]
        perturbed = trainer.controller.epsilon is not None
        self._trace = make_trace(trainer, collator, self._parts, 1, perturbed, MORE)
        self._batches, self._pairs = 0, len(trainer.eval_dataset)

    @contextmanager
    def parts(self) -> Iterator[None]:
        """A context around the evaluation, in which the part files are there."""
        main = self._accelerator.is_main_process
        if main:
            shutil.rmtree(self._parts, ignore_errors=True)  # of a run that was killed
            self._parts.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        try:
            yield
        finally:
            if main:
                shutil.rmtree(self._parts, ignore_errors=True)

    def add(self, batch: Batch, stats: TokenStats, pairs: PairOutcomes) -> None:
        """Adds a micro-batch; see `StepRecords.evaluated`."""
        self._batches += 1  # stands for the step, so that part files are cut between
        examples, lengths = batch["examples"].pairs, batch["lengths"]
        sets = torch.tensor([float(pair.get(SET, -1)) for pair in examples])
        values = traced_values(pairs, stats, lengths)
        values += [pairs.chosen_rewards, pairs.rejected_rewards, pairs.losses]
        values.append(on_device(sets, lengths.device))
        self._trace.observe(self._batches, examples, values)

    def write(self, step: int, sets: Sequence[str], summary: dict[str, Any]) -> None:
        """Joins the part files of all ranks; every rank calls it.

        Args:
            step: The last step of the trained model.
            sets: Names of the sets of `test_datasets:`.
            summary: JSON values.

        Raises:
            OSError: On the first rank, if it does not see the rows of all ranks.
        """
        self._trace.flush()
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            self._join(step, sets, summary)

    def _join(self, step: int, sets: Sequence[str], summary: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = sorted((self._parts / TRACE).glob(TRACE_FILES))
        table = pa.concat_tables(map(pq.read_table, files))
        if len(table) != self._pairs:
            raise OSError(
                f"{self._file.parent} has {len(table)} of {self._pairs} rows: it must "
                "be on a file system that all machines share"
            )
        names = [sets[int(n)] if n >= 0 else None for n in table["set"].to_pylist()]
        columns = {
            "global_step": pa.array([step] * len(table), pa.int64()),
            "set": pa.array(names, pa.string()),
        }
        for name, column in columns.items():
            table = table.set_column(table.column_names.index(name), name, column)
        metadata = {SCORES: json.dumps(summary)}
        partial = self._parts / self._file.name
        pq.write_table(
            table.replace_schema_metadata(metadata), partial, compression="zstd"
        )
        partial.replace(self._file)
