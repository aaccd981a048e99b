"""`PairTrace`: every N steps, a row per pair in Parquet files (`edpo_log_pairs`).

    <output_dir>/edpo_pairs/steps-00000001-00000050-rank0.parquet

Observing a micro-batch keeps one small tensor on the device and a list of its pairs.
Rows are built and texts decoded when a file is written: at each checkpoint, after
TOKENS tokens, and at the end of a run, even if it fails. A file is written under a
temporary name and renamed when it is complete.

All rows of a step on one rank are in one file, and no file spans a checkpoint. A run
that resumes a checkpoint removes the files of later steps and traces those steps again.

Columns:

    global_step                 optimizer step; the first is 1
    id                          digest of the pair's tokens, in hexadecimal
    plus, minus, step           Δ+, Δ- (nats) and s of Eq. 5; null unless
                                `edpo_control: epsilon`
    beta, margin                β̃ and the implicit reward margin, which includes β̃
    kl                          KL(π_θ || π_ref) per token of both answers, nats; null
                                if only log-probabilities are kept of the reference
    prompt_tokens               tokens of the prompt before truncation
    chosen_tokens, rejected_tokens   scored tokens of the answers
    prompt, chosen, rejected    text without special tokens; null if an earlier row of
                                the file has the same pair
    images                      thumbnails of its images, PNG files; null as the texts;
                                only in data with images
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from axolotl.utils.logging import get_logger

from ..data.columns import IDS
from ..data.pair_id import IMAGES, pair_digest
from ..run_files import TEXTS, THUMBNAILS, TRACE, TRACE_FILES

LOG = get_logger(__name__)

# A file of one rank ends after the step in which its pairs reach so many tokens. Until
# then the pairs are in memory, as Python lists of numbers.
TOKENS = 2**21
# The columns whose values `observe` takes, in this order.
VALUES = (
    "plus",
    "minus",
    "step",
    "beta",
    "margin",
    "kl",
    "chosen_tokens",
    "rejected_tokens",
)
PERTURBED = ("plus", "minus", "step")
INTEGERS = ("step", "chosen_tokens", "rejected_tokens")


class Observation(NamedTuple):
    """One micro-batch in the trace.

    Attributes:
        step: Optimizer step; the first is 1.
        pairs: Token columns and digest of the images of each pair.
        values: Shape (VALUES, pairs), float32, on the device.
    """

    step: int
    pairs: list[dict[str, Any]]
    values: torch.Tensor


class PairTrace:
    """The trace of one rank.

    Args:
        output_dir: The run's output folder.
        every: One of so many optimizer steps is traced.
        rank: Rank of this process.
        perturbed: Whether ε-DPO computes Δ+, Δ- and s.
        decode: Decodes lists of token ids to texts.
        thumbnails: Makes the thumbnails of a pair; None in data without images.
        more: Names of further columns, float32.

    Attributes:
        folder: Folder of the files.
        seconds: Seconds spent on the trace so far.
    """

    def __init__(
        self,
        output_dir: Path,
        every: int,
        rank: int,
        perturbed: bool,
        decode: Callable[[list[list[int]]], list[str]],
        thumbnails: Callable[[Mapping[str, Any]], list[bytes]] | None,
        more: Sequence[str] = (),
    ):
        self.folder = output_dir / TRACE
        self.seconds = 0.0
        self._timing_since: float | None = None
        self._every, self._rank = every, rank
        self._perturbed, self._decode = perturbed, decode
        self._thumbnails, self._more = thumbnails, tuple(more)
        self._observations: list[Observation] = []
        self._images: dict[str, list[bytes]] = {}
        self._tokens = 0

    def is_due(self, step: int) -> bool:
        """Whether this optimizer step is traced."""
        return step % self._every == 0

    def observe(
        self, step: int, pairs: list[dict[str, Any]], values: Sequence[torch.Tensor]
    ) -> None:
        """Adds a micro-batch; waits for the device only where it writes a file.

        Args:
            step: Optimizer step; the first is 1.
            pairs: Token columns of each pair, as the data loader yields them.
            values: A tensor of shape (pairs,) for each of VALUES and of `more`.
        """
        if self._tokens >= TOKENS and step != self._observations[-1].step:
            self.flush()
        stacked = torch.stack([value.detach().float() for value in values])
        if self._thumbnails is not None:
            for pair in pairs:
                if pair[IMAGES] not in self._images:
                    self._images[pair[IMAGES]] = self._thumbnails(pair)
        # without the images, which are large
        kept = [{k: pair[k] for k in (*IDS, IMAGES) if k in pair} for pair in pairs]
        self._observations.append(Observation(step, kept, stacked))
        self._tokens += sum(len(pair[key]) for pair in pairs for key in IDS)

    def flush(self) -> None:
        """Writes all observations since the last file to a new file."""
        with self.timed():
            if self._tokens:
                first, last = self._observations[0].step, self._observations[-1].step
                name = f"steps-{first:08}-{last:08}-rank{self._rank}.parquet"
                self._write(self.folder / name)
            self._observations, self._images, self._tokens = [], {}, 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A context whose duration is added to `seconds`; may be nested."""
        if self._timing_since is not None:
            yield
            return
        self._timing_since = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - self._timing_since
            self._timing_since = None

    def drop_after(self, step: int) -> None:
        """Removes files of later steps, left by an earlier or an interrupted run.

        Args:
            step: Files with later steps are removed. 0 at the start of a new run.
        """
        for file in self.folder.glob(TRACE_FILES):
            if int(file.name.split("-")[2]) > step:
                file.unlink(missing_ok=True)  # another machine may remove it first
        for file in self.folder.glob(".steps-*.partial"):
            file.unlink(missing_ok=True)

    def _write(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = self._columns()
        table = pa.table(columns, schema=self._schema(THUMBNAILS in columns))
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        pq.write_table(table, partial, compression="zstd")
        partial.replace(file)

    def _columns(self) -> dict[str, list]:
        """The columns of a file: name -> one value per row."""
        pairs = [pair for noted in self._observations for pair in noted.pairs]
        values = torch.cat([noted.values for noted in self._observations], dim=1)
        columns = {
            "global_step": [o.step for o in self._observations for _ in o.pairs],
            "id": [pair_digest(pair).hex() for pair in pairs],
            **dict(zip((*VALUES, *self._more), values.tolist(), strict=True)),
            "prompt_tokens": [len(pair[IDS[0]]) for pair in pairs],
        }
        for name in INTEGERS:
            columns[name] = [int(value) for value in columns[name]]
        columns["kl"] = [None if math.isnan(kl) else kl for kl in columns["kl"]]
        if not self._perturbed:
            columns |= dict.fromkeys(PERTURBED, [None] * len(pairs))
        return columns | self._texts(columns["id"], pairs)

    def _texts(self, ids: list[str], pairs: list[dict]) -> dict[str, list]:
        """Texts and thumbnails: in the first row of each pair, None in later ones."""
        first_rows = {name: row for row, name in reversed([*enumerate(ids)])}
        rows = sorted(first_rows.values())
        columns: dict[str, list] = {}
        for name, key in zip(TEXTS, IDS, strict=True):
            decoded = self._decode([pairs[row][key] for row in rows])
            text_of_row = dict(zip(rows, decoded, strict=True))
            columns[name] = [text_of_row.get(row) for row in range(len(pairs))]
        if self._thumbnails is not None:
            images = {row: self._images[pairs[row][IMAGES]] for row in rows}
            columns[THUMBNAILS] = [images.get(row) for row in range(len(pairs))]
        return columns

    def _schema(self, has_images: bool):
        """The Arrow schema of a file: columns in their order, with types."""
        import pyarrow as pa

        types = {name: pa.float32() for name in (*VALUES, *self._more)}
        types |= {"step": pa.int8()} | dict.fromkeys(INTEGERS[1:], pa.int32())
        types |= {"global_step": pa.int64(), "prompt_tokens": pa.int32()}
        types |= dict.fromkeys(["id", *TEXTS], pa.string())
        order = ["global_step", "id", *VALUES, *self._more, "prompt_tokens", *TEXTS]
        if has_images:
            order, types[THUMBNAILS] = [*order, THUMBNAILS], pa.list_(pa.binary())
        return pa.schema([(name, types[name]) for name in order])


@contextmanager
def flushed_at_end(trace: PairTrace | None) -> Iterator[None]:
    """A context around training that writes the trace however training ends.

    If training fails, an error while writing the trace becomes a warning.
    """
    try:
        yield
    except BaseException:
        if trace is not None:
            _flush_or_warn(trace)
        raise
    if trace is not None:
        trace.flush()


def _flush_or_warn(trace: PairTrace) -> None:
    try:
        trace.flush()
    except Exception as error:
        LOG.warning(f"{trace.folder}: the last steps are not in it: {error}")
