"""Hidden states of a reference on disk: by pair, in files that check themselves.

    FOLDER/IDENTITY/NAME.safetensors      a piece: some pairs
        pairs       (pairs, 16)           digest of the tokens of each
        lengths     (pairs, 2)            scored tokens of chosen and rejected
        checksums   (pairs, 8)            of the bytes of its hidden states
        hidden      (tokens, hidden)      pair after pair, chosen, then rejected

IDENTITY says which reference it is. A pair is found by its tokens: data may be
shuffled, split or extended, and runs that share a folder add to it without asking each
other. A piece appears under its name when it is whole, and is read after every byte of
it was checked. One that is damaged is as good as none: its pairs are missing.
"""

import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

SUFFIX, PARTIAL = ".safetensors", ".partial"
# A piece is written in seconds: what was begun this long ago was left by a killed run.
ABANDONED_SECONDS = 3600


class Damaged(ValueError):
    """A piece is not what was written; the message says how that shows."""


def digest_of(parts: Iterable[Sequence[int] | np.ndarray]) -> bytes:
    """What a pair is found by: 16 bytes.

    Args:
        parts: Tokens of prompt, chosen and rejected.
    """
    digest = xxhash.xxh3_128()
    for part in parts:
        ids = np.ascontiguousarray(part, dtype=np.int64)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.data)
    return digest.digest()


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _rows(digests: Iterable[bytes], width: int) -> torch.Tensor:
    joined = np.frombuffer(b"".join(digests), dtype=np.uint8)
    return torch.from_numpy(joined.copy()).view(-1, width)


@dataclass(frozen=True)
class Piece:
    """Some pairs of a file, memory-mapped.

    Attributes:
        path: The file.
        size: Its bytes.
        pairs: Their digests.
        lengths: Shape (pairs, 2).
        starts: Shape (pairs,), where in `hidden` a pair begins.
        checksums: One per pair.
        hidden: Shape (tokens, hidden), of the file.
    """

    path: Path
    size: int
    pairs: list[bytes]
    lengths: torch.Tensor
    starts: torch.Tensor
    checksums: list[bytes]
    hidden: torch.Tensor

    @classmethod
    def of(cls, path: Path, identity: str) -> "Piece":
        """Opens a file, without reading its hidden states.

        Raises:
            Damaged: If anything else in it is not as it was written.
            OSError: If it is not there, or may not be read.
        """
        size = path.stat().st_size
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                written = (file.metadata() or {}).get("digest")
            if written != _digest(tensors, identity):
                raise Damaged("its checksum is another")
        except (SafetensorError, KeyError) as error:
            raise Damaged(f"it is no piece ({error})") from None
        lengths = tensors["lengths"]
        ends = lengths.sum(dim=1).cumsum(dim=0)
        return cls(
            path,
            size,
            [bytes(row) for row in tensors["pairs"].numpy()],
            lengths,
            ends - lengths.sum(dim=1),
            [bytes(row) for row in tensors["checksums"].numpy()],
            tensors["hidden"],
        )

    def read(self, pair: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of chosen and rejected, each of shape (tokens, hidden).

        Raises:
            Damaged: If they are not as they were written.
        """
        with suppress(FileNotFoundError):  # its mapping is still there
            # what is not there any more cannot be touched: the process would end
            if self.path.stat().st_size != self.size:
                raise Damaged("its length is another")
        start, (chosen, rejected) = int(self.starts[pair]), self.lengths[pair].tolist()
        both = self.hidden[start : start + chosen + rejected]
        answers = both[:chosen], both[chosen:]
        if _checksum(answers) != self.checksums[pair]:
            raise Damaged("the checksum of a pair is another")
        return answers

    def verify(self) -> None:
        """Reads everything.

        Raises:
            Damaged: If anything is not as it was written.
        """
        for pair in range(len(self.pairs)):
            self.read(pair)


def _checksum(answers: Iterable[torch.Tensor]) -> bytes:
    """Of the hidden states of a pair: 8 bytes."""
    checksum = xxhash.xxh3_64()
    for answer in answers:
        checksum.update(raw(answer))
    return checksum.digest()


def _digest(tensors: dict[str, torch.Tensor], identity: str) -> str:
    """Of all but the hidden states themselves, which have checksums."""
    hidden = tensors["hidden"]
    digest = xxhash.xxh3_128(repr((identity, hidden.shape, hidden.dtype)).encode())
    for name in ("pairs", "lengths", "checksums"):
        digest.update(repr((tensors[name].shape, tensors[name].dtype)).encode())
        digest.update(raw(tensors[name]))
    return digest.hexdigest()


class Store:
    """The pieces of one reference.

    Args:
        folder: That runs share.
        identity: Of the reference; a name for a folder in it.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder, self._identity = folder / identity, identity
        self._found: dict[bytes, tuple[Piece, int]] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._found

    def names(self) -> list[str]:
        """What is there, in the same order for everyone; makes the folder.

        Removes what killed runs began.

        Raises:
            OSError: If the folder cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob(f"*{PARTIAL}"):
            with suppress(OSError):  # finished meanwhile, or of another user
                if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                    partial.unlink()
        return sorted(path.name for path in self.folder.glob(f"*{SUFFIX}"))

    def holds(self, name: str, wanted: Collection[bytes]) -> bool:
        """Whether a piece has any of these pairs; if so, every byte of it was read.

        Raises:
            Damaged: If it is not what was written.
            OSError: If it is not there, or may not be read.
        """
        piece = Piece.of(self.folder / name, self._identity)
        held = any(pair in wanted for pair in piece.pairs)
        if held:
            piece.verify()
        return held

    def discard(self, name: str) -> None:
        """Removes a piece."""
        (self.folder / name).unlink(missing_ok=True)

    def open(self, names: Iterable[str]) -> None:
        """From now on their pairs can be read.

        Raises:
            Damaged: If one is not what was written.
            OSError: If one is not there, or may not be read.
        """
        for name in names:
            piece = Piece.of(self.folder / name, self._identity)
            self._found |= {pair: (piece, i) for i, pair in enumerate(piece.pairs)}

    def lengths(self, digest: bytes) -> tuple[int, int]:
        """Scored tokens of a pair's chosen and rejected."""
        piece, pair = self._found[digest]
        chosen, rejected = piece.lengths[pair].tolist()
        return chosen, rejected

    def read(self, digest: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of a pair's chosen and rejected.

        Returns:
            Each of shape (tokens, hidden), memory-mapped.

        Raises:
            ValueError: If they changed since the store was opened.
        """
        piece, pair = self._found[digest]
        try:
            return piece.read(pair)
        except Damaged as error:
            raise ValueError(
                f"{piece.path} was damaged while it was in use ({error}): start again "
                "from the last checkpoint, and this part of it is computed anew"
            ) from None

    def write(
        self, pairs: Sequence[bytes], hidden: Sequence[tuple[torch.Tensor, ...]]
    ) -> None:
        """Adds a piece, which must hold at least one pair.

        Args:
            pairs: Their digests.
            hidden: Of chosen and rejected of each pair, shape (tokens, hidden).

        Raises:
            OSError: If it could not be written; nothing is left then.
        """
        tensors = {
            "pairs": _rows(pairs, 16),
            "lengths": torch.tensor([[*map(len, both)] for both in hidden]),
            "checksums": _rows(map(_checksum, hidden), 8),
            "hidden": torch.cat([answer for both in hidden for answer in both]),
        }
        path = self.folder / piece_name(pairs)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        metadata = {"digest": _digest(tensors, self._identity)}
        try:
            # not `save_file`: what that writes, only its owner may read
            partial.write_bytes(save(tensors, metadata))
            _publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    """Gives a whole file its name, unless another run was first: its may be in use."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        partial.replace(path)


def piece_name(pairs: Sequence[bytes]) -> str:
    """The file of these pairs, the same for everyone."""
    return xxhash.xxh3_128_hexdigest(b"".join(pairs)) + SUFFIX
