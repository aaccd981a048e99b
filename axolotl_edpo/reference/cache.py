"""`ReferenceCache`: keeps what a reference computed for each pair, in files on disk.

    FOLDER/FINGERPRINT/NAME.safetensors      a shard, which holds some pairs
        pairs       (pairs, 16)              digest of the tokens of each pair
        lengths     (pairs, 2)               scored tokens of chosen and rejected
        checksums   (pairs, 8)               checksum of what is kept of each pair
        hidden      (tokens, hidden)         pair after pair, chosen, then rejected

A cache keeps either the hidden states of every scored token, or only the
log-probabilities of the two answers of a pair. In the second case, the shards have
this tensor instead of `hidden`:

        logps       (2 x pairs,)             pair after pair, chosen, then rejected

FINGERPRINT is a digest of the reference, so each reference has a folder. A pair is
looked up by the digest of its tokens, so data may be shuffled, split or extended.
Several runs may write to one folder at once.

A shard is written under a temporary name, and renamed when it is complete. Each byte is
compared with its checksum before it is used. A damaged shard is ignored, and its pairs
are computed again.
"""

import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .kept import KeptPair

SUFFIX, PARTIAL = ".safetensors", ".partial"
# The tensor of a shard that holds a row per token, or one number per answer.
HIDDEN, LOGPS = "hidden", "logps"
# A partial file of this age was left by a killed run: writing a shard takes seconds.
ABANDONED_SECONDS = 3600


class Damaged(ValueError):
    """A shard differs from what was written; the message says in what."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a CPU tensor may share its memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _byte_rows(digests: Iterable[bytes], width: int) -> torch.Tensor:
    """Digests of `width` bytes as a tensor of shape (digests, width), uint8."""
    joined = np.frombuffer(b"".join(digests), dtype=np.uint8)
    return torch.from_numpy(joined.copy()).view(-1, width)


@dataclass(frozen=True)
class Shard:
    """An opened file of the cache, memory-mapped.

    Attributes:
        path: Path of the file.
        size: Size of the file when it was opened, in bytes.
        pairs: Digest of each pair.
        lengths: Shape (pairs, 2), int64, scored tokens of chosen and rejected.
        rows: Shape (pairs, 2), int64, rows of chosen and rejected in `kept`.
        starts: Shape (pairs,), int64, the first row of each pair in `kept`.
        checksums: Checksum of each pair, 8 bytes.
        kept: Shape (rows, ...): pair after pair, chosen, then rejected. Either hidden
            states, a row per token, or log-probabilities, a number per answer.
    """

    path: Path
    size: int
    pairs: list[bytes]
    lengths: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    checksums: list[bytes]
    kept: torch.Tensor

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> "Shard":
        """Opens a file, and checks everything but what is kept of each pair.

        Args:
            path: Path of the file.
            fingerprint: Fingerprint of the reference.

        Raises:
            Damaged: If the file differs from what was written.
            OSError: If the file is missing or cannot be read.
        """
        size, tensors = path.stat().st_size, _checked_tensors(path, fingerprint)
        lengths, kept = tensors["lengths"], _kept_tensor(tensors)
        rows = torch.ones_like(lengths) if kept == LOGPS else lengths
        of_pairs = rows.sum(dim=1)
        return cls(
            path,
            size,
            [bytes(row) for row in tensors["pairs"].numpy()],
            lengths,
            rows,
            of_pairs.cumsum(dim=0) - of_pairs,
            [bytes(row) for row in tensors["checksums"].numpy()],
            tensors[kept],
        )

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of chosen and rejected, see `ReferenceCache.read`.

        Args:
            index: Index of the pair in this shard.

        Raises:
            Damaged: If it differs from what was written.
        """
        self._require_same_size()
        start = int(self.starts[index])
        chosen, rejected = self.rows[index].tolist()
        both = self.kept[start : start + chosen + rejected]
        answers = both[:chosen], both[chosen:]
        if _checksum(answers) != self.checksums[index]:
            raise Damaged("the checksum of a pair is another")
        return answers

    def _require_same_size(self) -> None:
        """Refuses a file that was truncated: reading past its end kills the process.

        A file that was deleted is fine: its memory mapping can still be read.
        """
        with suppress(FileNotFoundError):
            if self.path.stat().st_size != self.size:
                raise Damaged("its length is another")

    def verify(self) -> None:
        """Checks what is kept of all pairs.

        Raises:
            Damaged: If any differ from what was written.
        """
        for index in range(len(self.pairs)):
            self.read(index)


def _checked_tensors(path: Path, fingerprint: str) -> dict[str, torch.Tensor]:
    """The tensors of a shard by name, memory-mapped.

    All are checked but the kept values: `Shard.read` checks those of a pair.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            digest = (file.metadata() or {}).get("digest")
        if digest != _index_digest(tensors, fingerprint):
            raise Damaged("its checksum is another")
    except (SafetensorError, KeyError) as error:
        raise Damaged(f"it is no piece ({error})") from None
    return tensors


def _kept_tensor(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the tensor that holds what is kept of each pair."""
    return LOGPS if LOGPS in tensors else HIDDEN


def _checksum(answers: Iterable[torch.Tensor]) -> bytes:
    """Checksum of what is kept of a pair, 8 bytes."""
    checksum = xxhash.xxh3_64()
    for answer in answers:
        checksum.update(tensor_bytes(answer))
    return checksum.digest()


def _index_digest(tensors: dict[str, torch.Tensor], fingerprint: str) -> str:
    """Digest of all tensors but the kept one, whose checksums are among them."""
    kept = tensors[_kept_tensor(tensors)]
    digest = xxhash.xxh3_128(repr((fingerprint, kept.shape, kept.dtype)).encode())
    for name in ("pairs", "lengths", "checksums"):
        digest.update(repr((tensors[name].shape, tensors[name].dtype)).encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


class ReferenceCache:
    """What is kept of one reference: hidden states, or log-probabilities of answers.

    Args:
        folder: Folder of the caches of all references.
        fingerprint: Fingerprint of the reference, which names its folder.

    Attributes:
        folder: Folder of this reference.
        shards: Opened shards.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self._fingerprint = folder / fingerprint, fingerprint
        self.shards: list[Shard] = []
        self._places: dict[bytes, tuple[Shard, int]] = {}

    def __contains__(self, digest: bytes) -> bool:
        """Whether an opened shard holds this pair."""
        return digest in self._places

    def names(self) -> list[str]:
        """Sorted file names of the shards on disk.

        Creates the folder if needed, and removes partial files of killed runs.

        Raises:
            OSError: If the folder cannot be created.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob(f"*{PARTIAL}"):
            with suppress(OSError):  # finished meanwhile, or another user's
                if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                    partial.unlink()
        return sorted(path.name for path in self.folder.glob(f"*{SUFFIX}"))

    def index_has(self, wanted: Iterable[bytes]) -> bool:
        """Whether the shards on disk name all of these pairs; reads no kept values.

        Args:
            wanted: Digests of pairs.

        Raises:
            OSError: If a file cannot be read.
        """
        missing = {*wanted}
        for name in self.names():
            with suppress(Damaged, FileNotFoundError):
                shard = Shard.open(self.folder / name, self._fingerprint)
                missing.difference_update(shard.pairs)
        return not missing

    def holds(self, name: str, wanted: Collection[bytes]) -> bool:
        """Whether a shard holds any of these pairs. If so, checks every byte of it.

        Args:
            name: File name of the shard.
            wanted: Digests of pairs.

        Raises:
            Damaged: If the shard differs from what was written.
            OSError: If the file is missing or cannot be read.
        """
        shard = Shard.open(self.folder / name, self._fingerprint)
        holds_any = any(pair in wanted for pair in shard.pairs)
        if holds_any:
            shard.verify()
        return holds_any

    def discard(self, name: str) -> None:
        """Deletes the file of a shard."""
        (self.folder / name).unlink(missing_ok=True)

    def open(self, names: Iterable[str]) -> None:
        """Opens shards, so that their pairs can be read.

        Args:
            names: File names of the shards.

        Raises:
            Damaged: If a shard differs from what was written.
            OSError: If a file is missing or cannot be read.
        """
        for name in names:
            shard = self._open_shard(self.folder / name)
            self.shards.append(shard)
            self._places |= {pair: (shard, i) for i, pair in enumerate(shard.pairs)}

    def _open_shard(self, path: Path) -> Shard:
        try:
            return Shard.open(path, self._fingerprint)
        except Damaged as error:
            raise Damaged(
                f"{path} was damaged since it was checked ({error}): start again, and "
                "its pairs are computed anew"
            ) from None

    def lengths(self, digest: bytes) -> tuple[int, int]:
        """Scored tokens of the chosen and the rejected answer of a pair.

        Args:
            digest: Digest of the pair, which must be in an open shard.
        """
        shard, index = self._places[digest]
        chosen, rejected = shard.lengths[index].tolist()
        return chosen, rejected

    def read(self, digest: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of the chosen and the rejected answer of a pair.

        Args:
            digest: Digest of the pair, which must be in an open shard.

        Returns:
            Hidden states, each of shape (tokens, hidden), or log-probabilities, each of
            shape (1,). They are memory-mapped.

        Raises:
            ValueError: If they differ from what was written.
        """
        shard, index = self._places[digest]
        try:
            return shard.read(index)
        except Damaged as error:
            raise ValueError(
                f"{shard.path} was damaged while it was in use ({error}): start again "
                "from the last checkpoint, and this part of it is computed anew"
            ) from None

    def write(self, pairs: Sequence[bytes], kept: Sequence[KeptPair]) -> None:
        """Writes a shard.

        Args:
            pairs: Digests of its pairs, at least one.
            kept: What is kept of each pair.

        Raises:
            OSError: If it cannot be written. No partial file is left.
        """
        answers = [pair.answers for pair in kept]
        values = torch.cat([answer for both in answers for answer in both])
        tensors = {
            "pairs": _byte_rows(pairs, 16),
            "lengths": torch.tensor([pair.lengths for pair in kept]),
            "checksums": _byte_rows(map(_checksum, answers), 8),
            LOGPS if values.dim() == 1 else HIDDEN: values,
        }
        path = self.folder / shard_name(pairs)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        metadata = {"digest": _index_digest(tensors, self._fingerprint)}
        try:
            # `save_file` would write files that only their owner can read
            partial.write_bytes(save(tensors, metadata))
            _publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    """Renames a complete file.

    If another run has already written this shard, that file stays: it may be in use.
    """
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        partial.replace(path)


def shard_name(pairs: Sequence[bytes]) -> str:
    """The file name of a shard with these pairs, the same in every run.

    Args:
        pairs: Digests, in their order in the shard.
    """
    return xxhash.xxh3_128_hexdigest(b"".join(pairs)) + SUFFIX
