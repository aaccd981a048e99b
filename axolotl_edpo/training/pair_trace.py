"""`PairTrace`: what every pair did, every N steps, in Parquet files (`edpo_log_pairs`).

    <output_dir>/edpo_pairs/steps-00000001-00000050-rank0.parquet

Noting a micro-batch keeps one small tensor on the device and the pairs as they are;
rows are made and texts decoded when a file is written: with each checkpoint, after
TOKENS tokens, and at the end of the run, also of one that fails. A file gets its name
when it is whole. No step is in two files and no file spans a checkpoint: a run that
goes on from one drops the files after it, and notes those steps again.

A row is an observation:

    global_step                 optimizer step; the first is 1
    id                          digest of the pair's tokens, in hexadecimal
    plus, minus, step           Δ+, Δ- (nats), s of Eq. 5; of `edpo_control: epsilon`
    beta, margin                β̃, and the implicit reward margin with it
    kl                          KL(π_θ || π_ref) per token of both answers, nats
    prompt_tokens               as they are
    chosen_tokens, rejected_tokens   as they are scored
    prompt, chosen, rejected    text without special tokens; where a file has it first
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..data.checks import IDS
from ..reference.precompute import pair_digest
from ..run_files import TEXTS, TRACE, TRACE_FILES

# Tokens of a rank's pairs after which the next step begins a new file: until then they
# are in memory, as Python's lists of numbers.
TOKENS = 2**21
# What is noted of a pair besides its tokens, in the order of `observe`.
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
PERTURBED = VALUES[:3]
WHOLE = ("step", "chosen_tokens", "rejected_tokens")


class PairTrace:
    """The trace of one rank.

    Args:
        output_dir: Of the run.
        every: Optimizer steps from one that is noted to the next.
        rank: Of this process.
        perturbed: Whether there are Δ+, Δ- and s.
        decode: Texts of lists of token ids.

    Attributes:
        seconds: Time that the trace took.
    """

    def __init__(
        self,
        output_dir: Path,
        every: int,
        rank: int,
        perturbed: bool,
        decode: Callable[[list[list[int]]], list[str]],
    ):
        self.folder = output_dir / TRACE
        self.seconds = 0.0
        self._began: float | None = None
        self._every, self._rank = every, rank
        self._perturbed, self._decode = perturbed, decode
        self._forget()

    def is_due(self, step: int) -> bool:
        """Whether the pairs of an optimizer step are noted."""
        return step % self._every == 0

    def observe(
        self, step: int, pairs: list[dict[str, Any]], values: Sequence[torch.Tensor]
    ) -> None:
        """Notes a micro-batch; does not sync.

        Args:
            step: Optimizer step, the first is 1.
            pairs: As the data loader gave them.
            values: Those of VALUES, each of shape (pairs,).
        """
        if self._tokens >= TOKENS and step != self._noted[-1][0]:
            self.flush()
        columns = torch.stack([value.detach().float() for value in values])
        self._noted.append((step, pairs, columns))
        self._tokens += sum(len(pair[key]) for pair in pairs for key in IDS)

    def flush(self) -> None:
        """Writes what was noted since the last file."""
        with self.timed():
            if self._tokens:
                first, last = self._noted[0][0], self._noted[-1][0]
                name = f"steps-{first:08}-{last:08}-rank{self._rank}.parquet"
                self._write(self.folder / name)
            self._forget()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What happens inside counts as time of the trace, once."""
        if self._began is not None:
            yield
            return
        self._began = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - self._began
            self._began = None

    def drop_after(self, step: int) -> None:
        """Removes what another run, or this one before it was interrupted, left.

        Args:
            step: The last one that counts; 0 where a run begins.
        """
        for file in self.folder.glob(TRACE_FILES):
            if int(file.name.split("-")[2]) > step:
                file.unlink(missing_ok=True)  # another machine may be faster
        for file in self.folder.glob(".steps-*.partial"):
            file.unlink(missing_ok=True)

    def _forget(self) -> None:
        self._noted: list[tuple[int, list[dict[str, Any]], torch.Tensor]] = []
        self._tokens = 0

    def _write(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(self._columns(), schema=_schema())
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        pq.write_table(table, partial, compression="zstd")
        partial.replace(file)

    def _columns(self) -> dict[str, list]:
        steps = [step for step, pairs, _ in self._noted for _ in pairs]
        pairs = [pair for _, noted, _ in self._noted for pair in noted]
        values = torch.cat([columns for *_, columns in self._noted], dim=1).tolist()
        columns = {
            "global_step": steps,
            "id": [pair_digest(pair).hex() for pair in pairs],
            **dict(zip(VALUES, values, strict=True)),
            "prompt_tokens": [len(pair[IDS[0]]) for pair in pairs],
        }
        for name in WHOLE:
            columns[name] = [int(value) for value in columns[name]]
        if not self._perturbed:
            columns |= dict.fromkeys(PERTURBED, [None] * len(pairs))
        return columns | self._texts(columns["id"], pairs)

    def _texts(self, ids: list[str], pairs: list[dict]) -> dict[str, list]:
        """The text of each pair where it comes first."""
        first = {name: row for row, name in reversed([*enumerate(ids)])}
        rows = sorted(first.values())
        texts: dict[str, list] = {}
        for name, key in zip(TEXTS, IDS, strict=True):
            decoded = self._decode([pairs[row][key] for row in rows])
            at = dict(zip(rows, decoded, strict=True))
            texts[name] = [at.get(row) for row in range(len(pairs))]
        return texts


def _schema():
    import pyarrow as pa

    kinds = {name: pa.float32() for name in VALUES} | {"step": pa.int8()}
    kinds |= dict.fromkeys([*WHOLE[1:], "prompt_tokens"], pa.int32())
    kinds |= dict.fromkeys(["id", *TEXTS], pa.string())
    order = ["global_step", "id", *VALUES, "prompt_tokens", *TEXTS]
    return pa.schema([(name, kinds.get(name, pa.int64())) for name in order])
