"""The pass that fills a store with a reference's hidden states, on all ranks.

    identity_of     which reference it is: weights, config, attention, dtype
    pairs_of        the pairs of the data sets, each once
    fill            verifies what is there, computes what is missing, piece by piece

Every rank writes pieces of its own. Under an engine that shards, no rank can run
alone, so all take the same decisions: the first rank's list of files, and everybody's
findings about them, are everybody's.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import xxhash
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.logging import get_logger
from datasets import Dataset
from datasets.utils.py_utils import size_str
from torch import nn
from tqdm import tqdm

from .engine import gathered
from .pairs import IDS, scored_lengths, token_rows
from .store import Damaged, Store, digest_of, piece_name, raw

LOG = get_logger(__name__)

KEY, FOLDER = "precompute_ref_log_probs", "edpo_reference_cache"
# Scored tokens of a piece: what a killed pass may lose on a rank, and what it holds in
# memory; 128 MiB of an 8B model in bf16.
PIECE_TOKENS = 2**14
# What a file holds beside its pairs' hidden states, at most: a header, and per pair
PIECE_BYTES, PAIR_BYTES = 1024, 40
# Recipe keys that change what a model computes from the same weights.
COMPUTE_KEYS = ("qat", "fp8", "tf32")
# Config keys that say nothing of what a model computes.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "use_cache")

# Hidden states of chosen and rejected of some pairs, each of shape (tokens, hidden).
HiddenOf = Callable[[list[dict[str, Any]]], list[tuple[torch.Tensor, torch.Tensor]]]


class Pair(NamedTuple):
    """A pair of the data, and where it is.

    Attributes:
        digest: Of its tokens.
        tokens: Scored ones, of both answers.
        dataset: That holds it.
        row: In that.
    """

    digest: bytes
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
        return cls(folder, {key: str(cfg.get(key)) for key in COMPUTE_KEYS})


def pair_digest(pair: dict[str, Any]) -> bytes:
    """What a pair of a data loader is found by."""
    return digest_of(pair[name] for name in IDS)


def pairs_of(datasets: Iterable[Dataset], max_length: int | None) -> list[Pair]:
    """All different pairs, the longest first: what does not fit shows at once."""
    found = {}
    for dataset in datasets:
        lengths = scored_lengths(dataset, max_length)
        for row, parts in enumerate(token_rows(dataset)):
            pair = Pair(digest_of(parts), int(lengths[row]), dataset, row)
            found[pair.digest] = pair
    return sorted(found.values(), key=lambda pair: (-pair.tokens, pair.digest))


def weights_digest(reference: nn.Module, leave_out: str = "default") -> str:
    """Of weights, buffers and scales in their order; gathered one after the other.

    Args:
        reference: Without its engine, sharded or not.
        leave_out: The adapter that trains.
    """
    digest, first = xxhash.xxh3_128(), PartialState().is_main_process
    for name, tensor in reference.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or leave_out in name.split("."):
            continue
        with gathered([tensor]) as (whole,):
            if first:
                digest.update(repr((tuple(whole.shape), whole.dtype)).encode())
                digest.update(raw(whole))
    return _of_first(digest.hexdigest())


def identity_of(config: Any, hidden: torch.Tensor, **more: Any) -> str:
    """Names a reference by all that its hidden states depend on, but the pair.

    Args:
        config: Of the causal language model.
        hidden: Some of its hidden states.
        **more: What else they depend on.
    """
    computed = config.to_dict()
    for key in _NOT_COMPUTED:
        computed.pop(key, None)
    told = {
        "config": computed,
        "attention": config._attn_implementation,
        "hidden": [hidden.shape[1], str(hidden.dtype)],
        "transformers": transformers.__version__,
        **more,
    }
    text = json.dumps(told, sort_keys=True, default=str)
    return _of_first(xxhash.xxh3_128_hexdigest(text.encode()))


def _of_first(value: Any) -> Any:
    """The first rank's, on every rank."""
    return broadcast_object_list([value], from_process=0)[0]


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
        self._open_what_is_whole()
        missing = [pair for pair in pairs if pair.digest not in self.store]
        there = f"{len(pairs) - len(missing)} of {len(pairs)} pairs"
        LOG.info(f"Reference cache: {there} are in {self.store.folder}.")
        if not missing:
            return
        pieces = [*_cut(missing)]
        self._require_space(pieces, like)
        self._compute(pieces)
        names = [piece_name([pair.digest for pair in piece]) for piece in pieces]
        self._together(self._open_all, names)

    def _open_what_is_whole(self) -> None:
        """Looks at every byte that is there, each rank at some of the files."""
        names = _of_first(self._together(self.store.names))
        own = tqdm(
            names[self.rank :: self.ranks],
            desc="Checking the reference cache",
            unit=" files",
            delay=1,
            disable=self.rank > 0,
        )
        found = gather_object([(name, self.store.damage(name)) for name in own])
        damaged = [(name, damage) for name, damage in found if damage]
        self._together(self._discard, damaged if self.rank == 0 else [])
        whole = [name for name, damage in found if not damage]
        self._together(self._open_all, whole)

    def _discard(self, damaged: Iterable[tuple[str, str]]) -> None:
        """Looks again: since the first look, another run may have written them anew."""
        for name, damage in damaged:
            if self.store.damage(name):
                LOG.warning(
                    f"{self.store.folder / name} is damaged: {damage}. Its pairs are "
                    "computed anew."
                )
                self.store.discard(name)

    def _open_all(self, names: Iterable[str]) -> None:
        try:
            self.store.open(names)
        except Damaged as error:
            raise OSError(
                f"rank {self.rank} does not find there what others did ({error}): it "
                "must be on a file system that all machines share"
            ) from None

    def _require_space(self, pieces: list[list[Pair]], like: torch.Tensor) -> None:
        """Says what is needed, and what there is."""
        count = sum(map(len, pieces))
        tokens = sum(pair.tokens for piece in pieces for pair in piece)
        width, dtype = like.shape[1], str(like.dtype).removeprefix("torch.")
        need = tokens * width * like.dtype.itemsize
        need += PIECE_BYTES * len(pieces) + PAIR_BYTES * count
        free = _of_first(shutil.disk_usage(self.store.folder).free)
        size = (
            f"{count:,} pairs, {tokens:,} tokens × {width} × {dtype} = "
            f"{size_str(need)} in {self.store.folder}, where {size_str(free)} are free"
        )
        if need > free:
            raise ValueError(
                f"`{KEY}: true` does not fit: {size}. Free {size_str(need - free)}, "
                f"name another disk with `{FOLDER}`, or remove `{KEY}`"
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
        made, error = None, None
        try:
            made = work(*arguments)
        except OSError as failed:
            error = str(failed)
        errors = [found for found in gather_object([error]) if found]
        if errors:
            raise ValueError(
                f"`{KEY}: true`: {self.store.folder} cannot be used ({errors[0]}): "
                f"name another folder with `{FOLDER}`, or remove `{KEY}`. What is "
                "already there is whole, and the next run goes on from it"
            )
        return made


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
