"""Hidden states on disk: what was written is read, and anything else is damage."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from axolotl_edpo.reference import hidden_cache as store_module
from axolotl_edpo.reference.hidden_cache import (
    ABANDONED_SECONDS,
    Damaged,
    Piece,
    Store,
    digest_of,
    piece_name,
    raw,
)

WIDTH = 8


def states(*lengths: int, dtype=torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return tuple(
        torch.randn(length, WIDTH, generator=generator).to(dtype) for length in lengths
    )


PAIRS = [digest_of([[1, 2], [number], [number, 3]]) for number in range(3)]
HIDDEN = [states(3, 5), states(1, 1), states(0, 4)]


def damage(store: Store, name: str) -> str | None:
    """What is wrong with a piece."""
    try:
        assert store.holds(name, PAIRS)
    except Damaged as error:
        return str(error)
    return None


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path, "reference")
    assert store.names() == []
    store.write(PAIRS, HIDDEN)
    return store


def test_what_was_written_is_read_to_the_bit_without_loading_it(store):
    store.open(store.names())
    for pair, answers in zip(PAIRS, HIDDEN, strict=True):
        for read, written in zip(store.read(pair), answers, strict=True):
            assert read.dtype == torch.bfloat16 and torch.equal(read, written)
    mapped = {store.read(pair)[1].untyped_storage().data_ptr() for pair in PAIRS}
    assert len(mapped) == 1  # views of the file's only mapping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_dtype_is_kept(tmp_path, dtype):
    store = Store(tmp_path, "reference")
    store.names()
    store.write(PAIRS[:1], [states(2, 3, dtype=dtype)])
    store.open(store.names())
    assert store.read(PAIRS[0])[0].dtype == dtype


def test_any_program_that_reads_safetensors_reads_a_piece(store):
    (name,) = store.names()
    with safe_open(store.folder / name, "pt") as file:
        assert file.get_tensor("lengths").tolist() == [[3, 5], [1, 1], [0, 4]]
        assert file.get_slice("hidden").get_shape() == [14, WIDTH]


def test_a_pair_is_found_by_its_tokens_and_where_they_are():
    pairs = [
        ([1], [2], [3]),
        ([1, 2], [], [3]),
        ([], [1, 2], [3]),
        ([1], [3], [2]),
        ([1], [2], [3, 0]),
    ]
    assert len({digest_of(pair) for pair in pairs}) == len(pairs)


def test_a_piece_has_the_name_of_its_pairs(store):
    assert store.names() == [piece_name(PAIRS)] != [piece_name(PAIRS[::-1])]


def test_what_is_missing_is_not_contained(store):
    store.open(store.names())
    assert PAIRS[0] in store and digest_of([[9]]) not in store


def test_every_flipped_byte_of_a_file_is_found(store):
    """But for those of the header's padding, which say nothing."""
    (name,) = store.names()
    path = store.folder / name
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = header - len(whole[:header].rstrip(b" "))
    unseen = []
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x41
        path.write_bytes(flipped)
        if damage(store, name) is None:
            unseen.append(position)
    assert set(unseen) <= set(range(header - padding, header))
    path.write_bytes(whole)
    assert damage(store, name) is None


@pytest.mark.parametrize("length", [0, 7, 8, 100, 500, -1])
def test_a_truncated_file_is_found(store, length):
    (name,) = store.names()
    path = store.folder / name
    path.write_bytes(path.read_bytes()[:length])
    assert "it is no piece" in damage(store, name)
    with pytest.raises(Damaged):
        store.open([name])


def test_a_piece_of_another_reference_is_damage(store, tmp_path):
    other, (name,) = Store(tmp_path, "another"), store.names()
    other.names()
    (store.folder / name).rename(other.folder / name)
    assert "checksum" in damage(other, name)


def test_damage_since_it_was_opened_stops_whoever_reads(store):
    (name,) = store.names()
    store.open([name])
    path = store.folder / name
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(raw(HIDDEN[2][1])))
        file.write(b"damage")
    store.read(PAIRS[0])
    with pytest.raises(ValueError, match=f"{name} was damaged while it was in use"):
        store.read(PAIRS[2])


def test_a_piece_that_is_cut_while_it_is_in_use_stops_whoever_reads(store):
    """To touch what is not there any more would end the process."""
    (name,) = store.names()
    store.open([name])
    os.truncate(store.folder / name, 0)
    with pytest.raises(ValueError, match="in use .its length is another"):
        store.read(PAIRS[0])


def test_a_piece_that_is_removed_while_it_is_in_use_is_still_read(store):
    store.open(store.names())
    store.discard(piece_name(PAIRS))
    assert torch.equal(store.read(PAIRS[1])[1], HIDDEN[1][1])


def test_what_two_runs_write_is_that_of_the_first(store):
    """Another run rounds otherwise, and may not take what is in use."""
    rounded = [tuple(answer + 0.01 for answer in answers) for answers in HIDDEN]
    store.write(PAIRS, rounded)
    store.open(store.names())
    assert torch.equal(store.read(PAIRS[0])[0], HIDDEN[0][0])
    assert [path.name for path in store.folder.iterdir()] == store.names()


def test_a_file_system_without_hard_links_will_do(store, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", refused)
    store.discard(piece_name(PAIRS))
    store.write(PAIRS, HIDDEN)
    assert damage(store, piece_name(PAIRS)) is None
    assert [path.name for path in store.folder.iterdir()] == store.names()


def refused(*_) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_what_may_not_be_read_is_no_damage(store, monkeypatch):
    """It may be another user's: nothing that is whole is removed."""
    monkeypatch.setattr(store_module, "safe_open", refused)
    with pytest.raises(PermissionError):
        store.holds(piece_name(PAIRS), PAIRS)


def test_of_pieces_that_are_not_wanted_no_hidden_state_is_read(store):
    (name,) = store.names()
    path = store.folder / name
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(raw(HIDDEN[0][0])))
        file.write(b"damage")
    assert not store.holds(name, [digest_of([[9]])])
    assert "checksum of a pair" in damage(store, name)


def test_what_a_killed_run_began_is_removed_when_it_is_old(store):
    young, old = (store.folder / f"{name}.partial" for name in ("young", "old"))
    for partial in (young, old):
        partial.write_bytes(b"begun")
    before = time.time() - ABANDONED_SECONDS - 1
    os.utime(old, (before, before))
    assert store.names() == [piece_name(PAIRS)]
    assert young.exists() and not old.exists()


def test_a_verified_piece_knows_its_pairs(store):
    (name,) = store.names()
    piece = Piece.of(store.folder / name, "reference")
    piece.verify()
    assert piece.pairs == PAIRS and piece.starts.tolist() == [0, 8, 10]
