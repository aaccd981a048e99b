"""The pass that fills a store with a reference's hidden states, on all ranks.

    pairs_of     the pairs of the data sets, each once
    Pass.fill    verifies what is there, computes what is missing, piece by piece

Every rank writes pieces of its own. Under an engine that shards, no rank can run
alone, so all take the same decisions: the first rank's list of files, and everybody's
findings about them, are everybody's.
"""

import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.logging import get_logger
from datasets import Dataset
from datasets.utils.py_utils import size_str
from tqdm import tqdm

from ..config.args import CACHE, PRECOMPUTE
from ..data.checks import IDS, scored_lengths, token_rows
from ..distributed import of_first
from .fingerprint import COMPUTE_KEYS
from .hidden_cache import PARTIAL, Damaged, Store, digest_of, piece_name

LOG = get_logger(__name__)

# Scored tokens of a piece: what a killed pass may lose on a rank; 128 MiB of an 8B
# model in bf16, and three times that in memory while it is written.
PIECE_TOKENS = 2**14
# What a file holds beside its pairs' hidden states, at most: a header, and per pair
PIECE_BYTES, PAIR_BYTES = 1024, 40
# Hidden states of chosen and rejected of some pairs, each of shape (tokens, hidden).
HiddenOf = Callable[[list[dict[str, Any]]], list[tuple[torch.Tensor, torch.Tensor]]]


class Pair(NamedTuple):
    """A pair of the data, and where it is.

    Attributes:
        digest: Of its tokens.
        length: Tokens of prompt and answers.
        tokens: Scored ones, of both answers.
        dataset: That holds it.
        row: In that.
    """

    digest: bytes
    length: int
    tokens: int
    dataset: Dataset
    row: int

    def example(self) -> dict[str, Any]:
        """As a data loader would hand it over."""
        return self.dataset[self.row]


class CacheSettings(NamedTuple):
    """What a recipe says of its cache.

    Attributes:
        folder: That runs may share.
        more: What the reference depends on that its weights and config do not show.
    """

    folder: Path
    more: dict[str, Any]

    @classmethod
    def of(cls, cfg: Any) -> "CacheSettings | None":
        """The settings of a recipe; None, if it wants no cache.

        By itself the cache is beside the prepared data: who shares these shares it.
        """
        if not cfg.precompute_ref_log_probs:
            return None
        prepared = Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH)
        folder = Path(cfg.edpo_reference_cache or prepared / "edpo_reference")
        return cls(
            folder.expanduser(), {key: str(cfg.get(key)) for key in COMPUTE_KEYS}
        )


def pair_digest(pair: dict[str, Any]) -> bytes:
    """What a pair of a data loader is found by."""
    return digest_of(pair[name] for name in IDS)


def pairs_of(datasets: Iterable[Dataset], max_length: int | None) -> list[Pair]:
    """All different pairs, the longest first: what does not fit shows at once."""
    found = {}
    for dataset in datasets:
        scored = scored_lengths(dataset, max_length)
        for row, parts in enumerate(token_rows(dataset)):
            length = sum(map(len, parts))
            pair = Pair(digest_of(parts), length, int(scored[row]), dataset, row)
            found[pair.digest] = pair
    return sorted(found.values(), key=lambda pair: (-pair.length, pair.digest))


@dataclass(frozen=True)
class Pass:
    """One walk over pairs that a store lacks.

    Attributes:
        store: To fill.
        accelerator: Whose ranks share the work.
        hidden_of: Runs on every rank at once; no pairs is an empty row.
        batch: Pairs of a forward.
    """

    store: Store
    accelerator: Accelerator
    hidden_of: HiddenOf
    batch: int

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    def fill(self, pairs: Sequence[Pair], like: torch.Tensor) -> None:
        """Returns when every pair can be read, on every rank.

        Args:
            pairs: The same on every rank.
            like: Some hidden states: their width and dtype.

        Raises:
            ValueError: If the folder cannot be written, is too small, or is not the
                same for all ranks.
        """
        self._open_what_is_whole({pair.digest for pair in pairs})
        missing = [pair for pair in pairs if pair.digest not in self.store]
        there = f"{len(pairs) - len(missing)} of {len(pairs)} pairs"
        LOG.info(f"Reference cache: {there} are in {self.store.folder}.")
        if not missing:
            return
        pieces = [*_cut(missing)]
        self._require_one_folder()
        self._require_space(pieces, like)
        self._compute(pieces)
        names = [piece_name([pair.digest for pair in piece]) for piece in pieces]
        self._together(self.store.open, names)

    def _open_what_is_whole(self, wanted: Collection[bytes]) -> None:
        """Reads every byte of the files with pairs that are wanted, each rank some."""
        names = of_first(self._together(self.store.names))
        own = self._together(self._look, names[self.rank :: self.ranks], wanted)
        found = gather_object(own)
        damaged = [(name, damage) for name, damage in found if damage]
        self._together(self._discard, damaged if self.rank == 0 else [], wanted)
        whole = [name for name, damage in found if not damage]
        self._together(self.store.open, whole)

    def _look(
        self, names: list[str], wanted: Collection[bytes]
    ) -> list[tuple[str, str]]:
        """Files with pairs that are wanted, and what is wrong with each, if it is."""
        found = []
        for name in tqdm(
            names,
            desc="Checking the reference cache",
            unit=" files",
            delay=1,
            disable=self.rank > 0,
        ):
            try:
                if self.store.holds(name, wanted):
                    found.append((name, ""))
            except Damaged as error:
                found.append((name, str(error)))
            except FileNotFoundError:  # it was damaged, and another run discarded it
                continue
        return found

    def _discard(
        self, damaged: Iterable[tuple[str, str]], wanted: Collection[bytes]
    ) -> None:
        """Looks again: since the first look, another run may have written them anew."""
        for name, damage in damaged:
            if any(error for _, error in self._look([name], wanted)):
                LOG.warning(
                    f"{self.store.folder / name} is damaged: {damage}. Its pairs are "
                    "computed anew."
                )
                self.store.discard(name)

    def _require_one_folder(self) -> None:
        """That all ranks see what one of them writes."""
        sign = self.store.folder / of_first(f"{uuid.uuid4().hex}{PARTIAL}")
        self._together(sign.touch if self.rank == 0 else bool)
        try:
            self._together(self._find, sign)
        finally:
            if self.rank == 0:
                sign.unlink(missing_ok=True)

    def _find(self, sign: Path) -> None:
        if not sign.exists():
            raise OSError(
                f"rank {self.rank} does not see there what rank 0 wrote: it must be on "
                "a file system that all machines share"
            )

    def _require_space(self, pieces: list[list[Pair]], like: torch.Tensor) -> None:
        """Says what is needed, and what there is."""
        count = sum(map(len, pieces))
        tokens = sum(pair.tokens for piece in pieces for pair in piece)
        width, dtype = like.shape[1], str(like.dtype).removeprefix("torch.")
        need = tokens * width * like.dtype.itemsize
        need += PIECE_BYTES * len(pieces) + PAIR_BYTES * count
        free = of_first(self._together(_free, self.store.folder))
        size = (
            f"{count:,} pairs, {tokens:,} tokens × {width} × {dtype} = "
            f"{size_str(need)} in {self.store.folder}, where {size_str(free)} are free"
        )
        if need > free:
            raise ValueError(
                f"`{PRECOMPUTE}: true` does not fit: {size}. Free "
                f"{size_str(need - free)}, name another disk with `{CACHE}`, or remove "
                f"`{PRECOMPUTE}`"
            )
        LOG.info(f"Reference cache: computing {size}.")

    def _compute(self, pieces: list[list[Pair]]) -> None:
        """As many pieces at once as there are ranks, all in the same number of steps.

        Raises:
            ValueError: On every rank, if one of them cannot write.
        """
        with tqdm(
            total=sum(pair.tokens for piece in pieces for pair in piece),
            desc="Hidden states of the reference",
            unit=" tokens",
            unit_scale=True,
            disable=self.rank > 0,
        ) as bar:
            for first in range(0, len(pieces), self.ranks):
                group = pieces[first : first + self.ranks]
                own = group[self.rank] if self.rank < len(group) else []
                hidden = []
                for start in range(0, max(map(len, group)), self.batch):
                    now = slice(start, start + self.batch)
                    hidden += self.hidden_of([pair.example() for pair in own[now]])
                    bar.update(sum(p.tokens for piece in group for p in piece[now]))
                self._together(self._write, own, hidden)

    def _write(self, piece: list[Pair], hidden: list[tuple[torch.Tensor, ...]]) -> None:
        if piece:
            self.store.write([pair.digest for pair in piece], hidden)

    def _together(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What a rank's work on files returns; where one fails, all stop.

        Raises:
            ValueError: Names the folder and the first rank's error.
        """
        made, cause = None, None
        try:
            made = work(*arguments)
        except Exception as error:  # whatever it is, the others must not wait
            cause = error
        errors = [found for found in gather_object([cause and str(cause)]) if found]
        if errors:
            raise ValueError(
                f"`{PRECOMPUTE}: true`: {self.store.folder} cannot be used "
                f"({errors[0]}): name another folder with `{CACHE}`, or remove "
                f"`{PRECOMPUTE}`. What is already there is whole, and the next run "
                "goes on from it"
            ) from cause
        return made


def _free(folder: Path) -> int:
    """Bytes on its disk."""
    return shutil.disk_usage(folder).free


def _cut(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Pieces of at most PIECE_TOKENS, but for a pair that alone has more."""
    piece: list[Pair] = []
    tokens = 0
    for pair in pairs:
        if piece and tokens + pair.tokens > PIECE_TOKENS:
            yield piece
            piece, tokens = [], 0
        piece.append(pair)
        tokens += pair.tokens
    if piece:
        yield piece
