"""Fills a cache with what is kept of a reference, on all ranks.

    distinct_pairs         the pairs of the data sets, each once
    PrecomputePass.fill    checks the shards on disk, computes the missing pairs

Each shard is written by one rank. If an engine shards the model, all ranks have to run
it together. So they must agree on the missing pairs: all use the file list of rank 0,
and exchange the results of their checks.
"""

import pickle
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from datasets import Dataset
from tqdm import tqdm

from ..config.args import CACHE, PRECOMPUTE
from ..data.columns import scored_lengths, token_rows
from ..data.pair_id import IMAGES, digest_of
from ..distributed import broadcast_from_rank0, data_ranks, row_group
from ..upstream import size_in_words
from ..upstream_data import prepared_root
from .cache import PARTIAL, Damaged, ReferenceCache, shard_name
from .fingerprint import COMPUTE_KEYS
from .kept import KL, Kept, KeptPair

LOG = get_logger(__name__)

# Scored tokens of a shard, which are lost if a rank is killed. For an 8B model in bf16,
# a shard has 128 MiB, and takes three times that in memory while it is written.
SHARD_TOKENS = 2**14
# Upper bounds of the bytes of a file besides what is kept: its header, and per pair.
HEADER_BYTES, PAIR_BYTES = 1024, 40


class DataPair(NamedTuple):
    """A pair of a data set.

    Attributes:
        digest: Digest of its tokens.
        length: Tokens of prompt and both answers.
        scored_tokens: Scored tokens of both answers.
        dataset: The data set that holds it.
        row: Its row in the data set.
    """

    digest: bytes
    length: int
    scored_tokens: int
    dataset: Dataset
    row: int

    def example(self) -> dict[str, Any]:
        """The pair as a data loader would yield it."""
        return self.dataset[self.row]


@dataclass(frozen=True)
class CacheSettings:
    """Settings of a cache.

    Attributes:
        folder: Folder of the caches, which runs may share.
        fingerprint_parts: Recipe keys that hidden states depend on, besides weights and
            config of the reference: key -> value.
        needs_logits: Whether the run needs the reference's logits, and so its hidden
            states. Else two log-probabilities per pair are enough.
    """

    folder: Path
    fingerprint_parts: dict[str, Any]
    needs_logits: bool = True

    @classmethod
    def from_config(cls, cfg: Any) -> "CacheSettings | None":
        """The settings of a recipe; None without `precompute_ref_log_probs`.

        By default the cache is in the folder of the prepared data, so that runs with
        the same folder share it.
        """
        if not cfg.precompute_ref_log_probs:
            return None
        prepared = prepared_root(cfg)
        folder = Path(cfg.edpo_reference_cache or prepared / "edpo_reference")
        parts = {key: str(cfg.get(key)) for key in COMPUTE_KEYS}
        return cls(folder.expanduser(), parts, _needs_logits(cfg))


def _needs_logits(cfg: Any) -> bool:
    """Whether β, the best checkpoint or a bound depends on the whole vocabulary."""
    best = cfg.get("metric_for_best_model") or ""
    bounded = cfg.edpo_max_kl is not None
    return cfg.edpo_control == "epsilon" or bounded or best.endswith(KL)


def distinct_pairs(
    datasets: Iterable[Dataset], max_length: int | None
) -> list[DataPair]:
    """The pairs of data sets without duplicates, longest first.

    The longest come first so that a run that lacks memory fails at once.

    Args:
        datasets: Tokenized data sets.
        max_length: Sequences are truncated to so many tokens; None: never.
    """
    pairs = {}
    for dataset in datasets:
        scored = scored_lengths(dataset, max_length)
        has_images = IMAGES in dataset.column_names
        images = dataset[IMAGES] if has_images else repeat("")
        for row, (parts, of_images) in enumerate(
            zip(token_rows(dataset), images, strict=False)
        ):
            digest, length = digest_of(parts, of_images), sum(map(len, parts))
            pairs[digest] = DataPair(digest, length, int(scored[row]), dataset, row)
    return sorted(pairs.values(), key=lambda pair: (-pair.length, pair.digest))


@dataclass(frozen=True)
class PrecomputePass:
    """Computes what a cache lacks.

    Attributes:
        cache: The cache to fill.
        accelerator: The run's accelerator, whose ranks divide the work.
        kept: Computes what is kept of pairs. All ranks call it together.
        batch_size: Pairs per forward.
    """

    cache: ReferenceCache
    accelerator: Accelerator
    kept: Kept
    batch_size: int

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.accelerator.num_processes

    def fill(self, pairs: Sequence[DataPair]) -> None:
        """Fills the cache: afterwards every pair can be read on every rank.

        Args:
            pairs: The pairs to cache, the same on every rank.

        Raises:
            ValueError: If the folder cannot be written, its disk has too little space,
                or the ranks do not share it.
        """
        self._open_whole_shards({pair.digest for pair in pairs})
        missing = [pair for pair in pairs if pair.digest not in self.cache]
        present = f"{len(pairs) - len(missing)} of {len(pairs)} pairs"
        LOG.info(f"Reference cache: {present} are in {self.cache.folder}.")
        if not missing:
            return
        shards = [*_split_into_shards(missing)]
        self._require_shared_folder()
        self._require_space(shards)
        self._compute(shards)
        names = [shard_name([pair.digest for pair in shard]) for shard in shards]
        with fail_together(self.cache.folder):
            self.cache.open(names)

    def index_has(self, pairs: Sequence[DataPair]) -> bool:
        """Whether the files on disk, as far as rank 0 sees, have all of these pairs.

        Raises:
            ValueError: If the folder cannot be used.
        """
        has_all = False
        with fail_together(self.cache.folder):
            if self.rank == 0:
                has_all = self.cache.index_has(pair.digest for pair in pairs)
        return broadcast_from_rank0(has_all)

    # --- what is there --------------------------------------------------------------

    def _open_whole_shards(self, wanted: Collection[bytes]) -> None:
        """Opens the whole shards that hold wanted pairs; ranks divide the checking."""
        folder = self.cache.folder
        with fail_together(folder):
            names = self.cache.names()
        names = broadcast_from_rank0(names)
        with fail_together(folder):
            findings = self._check(names[self.rank :: self.ranks], wanted)
        findings = gather_object(findings)
        with fail_together(folder):
            if self.rank == 0:
                self._discard_damaged(findings, wanted)
        with fail_together(folder):
            self.cache.open(name for name, damage in findings if not damage)

    def _check(
        self, names: list[str], wanted: Collection[bytes]
    ) -> list[tuple[str, str]]:
        """Checks those of the named shards that hold wanted pairs.

        Returns:
            Name and damage of each checked shard; the damage is empty if it is whole.
        """
        findings = []
        for name in tqdm(
            names,
            desc="Checking the reference cache",
            unit=" files",
            delay=1,
            disable=self.rank > 0,
        ):
            try:
                if self.cache.holds(name, wanted):
                    findings.append((name, ""))
            except Damaged as error:
                findings.append((name, str(error)))
            except FileNotFoundError:  # damaged, and another run deleted it
                continue
        return findings

    def _discard_damaged(
        self, findings: Iterable[tuple[str, str]], wanted: Collection[bytes]
    ) -> None:
        """Deletes damaged shards.

        Each is checked again first: another run may have replaced it by a whole one.
        """
        for name, damage in findings:
            if damage and any(again for _, again in self._check([name], wanted)):
                LOG.warning(
                    f"{self.cache.folder / name} is damaged: {damage}. Its pairs are "
                    "computed anew."
                )
                self.cache.discard(name)

    # --- what is needed -------------------------------------------------------------

    def _require_shared_folder(self) -> None:
        """Refuses a folder in which ranks do not see each other's files."""
        folder = self.cache.folder
        marker = folder / broadcast_from_rank0(f"{uuid.uuid4().hex}{PARTIAL}")
        with fail_together(folder):
            if self.rank == 0:
                marker.touch()
        try:
            with fail_together(folder):
                self._require_visible(marker)
        finally:
            if self.rank == 0:
                marker.unlink(missing_ok=True)

    def _require_visible(self, marker: Path) -> None:
        if not marker.exists():
            raise OSError(
                f"rank {self.rank} does not see there what rank 0 wrote: it must be on "
                "a file system that all machines share"
            )

    def _require_space(self, shards: list[list[DataPair]]) -> None:
        """Logs the bytes that are needed; refuses a disk with less free space."""
        pairs = sum(map(len, shards))
        needed, what = self.kept.size(pairs, _scored_tokens(shards))
        needed += HEADER_BYTES * len(shards) + PAIR_BYTES * pairs
        free = self._free_bytes()
        size = (
            f"{pairs:,} pairs, {what} = {size_in_words(needed)} in "
            f"{self.cache.folder}, where {size_in_words(free)} are free"
        )
        if needed > free:
            raise ValueError(
                f"`{PRECOMPUTE}: true` does not fit: {size}. Free "
                f"{size_in_words(needed - free)}, name another disk with `{CACHE}`, or "
                f"remove `{PRECOMPUTE}`"
            )
        LOG.info(f"Reference cache: computing {size}.")

    def _free_bytes(self) -> int:
        """Free bytes on the disk of the cache, as rank 0 sees it."""
        with fail_together(self.cache.folder):
            free = shutil.disk_usage(self.cache.folder).free
        return broadcast_from_rank0(free)

    # --- what is missing ------------------------------------------------------------

    def _compute(self, shards: list[list[DataPair]]) -> None:
        """Computes and writes shards, one per row group at a time.

        Raises:
            ValueError: On every rank, if a rank cannot write.
        """
        with tqdm(
            total=_scored_tokens(shards),
            desc="Running the reference",
            unit=" tokens",
            unit_scale=True,
            disable=self.rank > 0,
        ) as bar:
            count, _ = data_ranks(self.accelerator)
            for first in range(0, len(shards), count):
                self._compute_together(shards[first : first + count], bar)

    def _compute_together(self, shards: list[list[DataPair]], bar: tqdm) -> None:
        """Computes one shard per row group; all run the same number of forwards.

        A group without a shard, or with fewer pairs, runs the reference without pairs.
        The first rank of a group writes.
        """
        _, index = data_ranks(self.accelerator)
        shard = shards[index] if index < len(shards) else []
        kept: list[KeptPair] = []
        for start in range(0, max(map(len, shards)), self.batch_size):
            batch = slice(start, start + self.batch_size)
            kept += self.kept.of([pair.example() for pair in shard[batch]])
            bar.update(_scored_tokens(pairs[batch] for pairs in shards))
        writes = row_group(self.accelerator).rank == 0
        with fail_together(self.cache.folder):
            if shard and writes:
                self.cache.write([pair.digest for pair in shard], kept)


@contextmanager
def fail_together(folder: Path) -> Iterator[None]:
    """A context for file operations: if it fails on one rank, it raises on all ranks.

    All ranks must enter it. Otherwise ranks without an error would wait for ever at the
    next collective.

    Args:
        folder: The cache's folder, for the message.

    Raises:
        ValueError: In place of an OSError. Names the folder, the cause and the remedy.
        Exception: Any other error of this rank. A rank without an error raises that of
            the first rank that has one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # of any kind: the other ranks must not wait
        error = raised
    failures = [e for e in gather_object([_as_sent(error)]) if e is not None]
    if not failures:
        return
    failure = failures[0] if error is None else error
    if not isinstance(failure, OSError):
        raise failure
    raise ValueError(
        f"`{PRECOMPUTE}: true`: {folder} cannot be used ({failure}): name another "
        f"folder with `{CACHE}`, or remove `{PRECOMPUTE}`. What is already there is "
        "whole, and the next run goes on from it"
    ) from error


def _as_sent(error: Exception | None) -> Exception | None:
    """An error that can be pickled: a copy, or a RuntimeError with its message."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # pickling an error may fail in any way
        return RuntimeError(f"{type(error).__name__}: {error}")


def _scored_tokens(shards: Iterable[Iterable[DataPair]]) -> int:
    return sum(pair.scored_tokens for shard in shards for pair in shard)


def _split_into_shards(pairs: Iterable[DataPair]) -> Iterator[list[DataPair]]:
    """Splits pairs into shards of at most SHARD_TOKENS; a longer pair is one shard."""
    shard: list[DataPair] = []
    tokens = 0
    for pair in pairs:
        if shard and tokens + pair.scored_tokens > SHARD_TOKENS:
            yield shard
            shard, tokens = [], 0
        shard.append(pair)
        tokens += pair.scored_tokens
    if shard:
        yield shard
