"""Hidden states on disk: what was written is read, and anything else is damage."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
import xxhash
from helpers.paths import DATA
from safetensors import safe_open
from safetensors.torch import load_file

from axolotl_edpo.data.pair_id import digest_of
from axolotl_edpo.reference import cache as reference_cache
from axolotl_edpo.reference.cache import (
    ABANDONED_SECONDS,
    Damaged,
    ReferenceCache,
    Shard,
    shard_name,
    tensor_bytes,
)
from axolotl_edpo.reference.kept import KeptPair

WIDTH = 8
F64 = {"dtype": torch.float64}
RELEASED = DATA / "releases" / "92e9327" / "cache"


def states(*lengths: int, dtype=torch.bfloat16) -> KeptPair:
    generator = torch.Generator().manual_seed(sum(lengths))
    both = (
        torch.randn(length, WIDTH, generator=generator).to(dtype) for length in lengths
    )
    return KeptPair(*both, lengths)


PAIRS = [digest_of([[1, 2], [number], [number, 3]]) for number in range(3)]
HIDDEN = [states(3, 5), states(1, 1), states(0, 4)]


def damage(cache: ReferenceCache, name: str) -> str | None:
    """What is wrong with a shard."""
    try:
        assert cache.holds(name, PAIRS)
    except Damaged as error:
        return str(error)
    return None


@pytest.fixture
def cache(tmp_path):
    cache = ReferenceCache(tmp_path, "reference")
    assert cache.names() == []
    cache.write(PAIRS, HIDDEN)
    return cache


def test_what_was_written_is_read_to_the_bit_without_loading_it(cache):
    cache.open(cache.names())
    for pair, kept in zip(PAIRS, HIDDEN, strict=True):
        for read, written in zip(cache.read(pair), kept.answers, strict=True):
            assert read.dtype == torch.bfloat16 and torch.equal(read, written)
    mapped = {cache.read(pair)[1].untyped_storage().data_ptr() for pair in PAIRS}
    assert len(mapped) == 1  # views of the file's only mapping


LOGPS = [
    KeptPair(torch.tensor([-1e3 - n], **F64), torch.tensor([-n / 3], **F64), (9, n))
    for n in range(3)
]


@pytest.fixture
def numbers(tmp_path):
    cache = ReferenceCache(tmp_path, "reference/answers")
    assert cache.names() == []
    cache.write(PAIRS, LOGPS)
    return cache


def test_two_numbers_per_pair_are_read_to_the_bit(numbers):
    (name,) = numbers.names()
    assert numbers.holds(name, PAIRS)
    numbers.open([name])
    for pair, kept in zip(PAIRS, LOGPS, strict=True):
        assert numbers.lengths(pair) == kept.lengths
        for read, written in zip(numbers.read(pair), kept.answers, strict=True):
            assert read.dtype == torch.float64 and torch.equal(read, written)
    with safe_open(numbers.folder / name, "pt") as file:
        assert sorted(file.keys()) == ["checksums", "lengths", "logps", "pairs"]
        assert file.get_slice("logps").get_shape() == [2 * len(PAIRS)]


def test_a_damaged_number_is_found(numbers):
    (name,) = numbers.names()
    path = numbers.folder / name
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(tensor_bytes(LOGPS[2].rejected)))
        file.write(b"damage")
    assert "checksum of a pair" in damage(numbers, name)


def test_numbers_lie_below_the_hidden_states_and_neither_is_taken_for_the_other(
    cache, numbers
):
    assert numbers.folder.parent == cache.folder
    assert cache.names() == numbers.names()  # of the same pairs, so of one name
    (name,) = numbers.names()
    (numbers.folder / name).replace(cache.folder / name)
    assert "checksum" in damage(cache, name)


def test_the_index_knows_if_all_pairs_are_there(cache):
    other = digest_of([[9]])
    assert cache.index_has(PAIRS) and cache.index_has(PAIRS[1:])
    assert not cache.index_has([*PAIRS, other])
    cache.write([other], [states(2, 2)])
    assert cache.index_has([*PAIRS, other])
    path = cache.folder / shard_name(PAIRS)
    path.write_bytes(path.read_bytes()[:100])
    assert not cache.index_has(PAIRS) and cache.index_has([other])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_dtype_is_kept(tmp_path, dtype):
    cache = ReferenceCache(tmp_path, "reference")
    cache.names()
    cache.write(PAIRS[:1], [states(2, 3, dtype=dtype)])
    cache.open(cache.names())
    assert cache.read(PAIRS[0])[0].dtype == dtype


def test_any_program_that_reads_safetensors_reads_a_shard(cache):
    (name,) = cache.names()
    with safe_open(cache.folder / name, "pt") as file:
        assert file.get_tensor("lengths").tolist() == [[3, 5], [1, 1], [0, 4]]
        assert file.get_slice("hidden").get_shape() == [14, WIDTH]


def test_a_shard_has_the_name_of_its_pairs(cache):
    assert cache.names() == [shard_name(PAIRS)] != [shard_name(PAIRS[::-1])]


def test_what_is_missing_is_not_contained(cache):
    cache.open(cache.names())
    assert PAIRS[0] in cache and digest_of([[9]]) not in cache


def test_every_flipped_byte_of_a_file_is_found(cache):
    """But for those of the header's padding, which say nothing."""
    (name,) = cache.names()
    path = cache.folder / name
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = header - len(whole[:header].rstrip(b" "))
    unseen = []
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x41
        path.write_bytes(flipped)
        if damage(cache, name) is None:
            unseen.append(position)
    assert set(unseen) <= set(range(header - padding, header))
    path.write_bytes(whole)
    assert damage(cache, name) is None


@pytest.mark.parametrize("length", [0, 7, 8, 100, 500, -1])
def test_a_truncated_file_is_found(cache, length):
    (name,) = cache.names()
    path = cache.folder / name
    path.write_bytes(path.read_bytes()[:length])
    assert "it is no piece" in damage(cache, name)
    with pytest.raises(Damaged):
        cache.open([name])


def test_a_shard_of_another_reference_is_damage(cache, tmp_path):
    other, (name,) = ReferenceCache(tmp_path, "another"), cache.names()
    other.names()
    (cache.folder / name).rename(other.folder / name)
    assert "checksum" in damage(other, name)


def test_damage_since_it_was_opened_stops_whoever_reads(cache):
    (name,) = cache.names()
    cache.open([name])
    path = cache.folder / name
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(tensor_bytes(HIDDEN[2].rejected)))
        file.write(b"damage")
    cache.read(PAIRS[0])
    with pytest.raises(ValueError, match=f"{name} was damaged while it was in use"):
        cache.read(PAIRS[2])


def test_a_shard_that_is_cut_while_it_is_in_use_stops_whoever_reads(cache):
    """To touch what is not there any more would end the process."""
    (name,) = cache.names()
    cache.open([name])
    os.truncate(cache.folder / name, 0)
    with pytest.raises(ValueError, match="in use .its length is another"):
        cache.read(PAIRS[0])


def test_a_shard_that_is_removed_while_it_is_in_use_is_still_read(cache):
    cache.open(cache.names())
    cache.discard(shard_name(PAIRS))
    assert torch.equal(cache.read(PAIRS[1])[1], HIDDEN[1].rejected)


def test_what_two_runs_write_is_that_of_the_first(cache):
    """Another run rounds otherwise, and may not take what is in use."""
    rounded = [
        KeptPair(*(answer + 0.01 for answer in kept.answers), kept.lengths)
        for kept in HIDDEN
    ]
    cache.write(PAIRS, rounded)
    cache.open(cache.names())
    assert torch.equal(cache.read(PAIRS[0])[0], HIDDEN[0].chosen)
    assert [path.name for path in cache.folder.iterdir()] == cache.names()


def test_a_file_system_without_hard_links_will_do(cache, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", refused)
    cache.discard(shard_name(PAIRS))
    cache.write(PAIRS, HIDDEN)
    assert damage(cache, shard_name(PAIRS)) is None
    assert [path.name for path in cache.folder.iterdir()] == cache.names()


def refused(*_) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_what_may_not_be_read_is_no_damage(cache, monkeypatch):
    """It may be another user's: nothing that is whole is removed."""
    monkeypatch.setattr(reference_cache, "safe_open", refused)
    with pytest.raises(PermissionError):
        cache.holds(shard_name(PAIRS), PAIRS)


def test_of_shards_that_are_not_wanted_no_hidden_state_is_read(cache):
    (name,) = cache.names()
    path = cache.folder / name
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(tensor_bytes(HIDDEN[0].chosen)))
        file.write(b"damage")
    assert not cache.holds(name, [digest_of([[9]])])
    assert "checksum of a pair" in damage(cache, name)


def test_a_shard_is_wanted_for_any_of_its_pairs(cache):
    (name,) = cache.names()
    assert all(cache.holds(name, [digest_of([[9]]), pair]) for pair in PAIRS)


def test_what_a_killed_run_began_is_removed_when_it_is_old(cache):
    young, old = (cache.folder / f"{name}.partial" for name in ("young", "old"))
    for partial in (young, old):
        partial.write_bytes(b"begun")
    before = time.time() - ABANDONED_SECONDS - 1
    os.utime(old, (before, before))
    assert cache.names() == [shard_name(PAIRS)]
    assert young.exists() and not old.exists()


def test_a_verified_shard_knows_its_pairs(cache):
    (name,) = cache.names()
    shard = Shard.open(cache.folder / name, "reference")
    shard.verify()
    assert shard.pairs == PAIRS and shard.starts.tolist() == [0, 8, 10]


def test_a_cache_of_an_earlier_release_is_read():
    """Written by the commit 92e9327, on which this package had another layout."""
    (folder,) = RELEASED.iterdir()
    cache = ReferenceCache(RELEASED, folder.name)
    (name,) = cache.names()
    cache.open([name])
    (shard,) = cache.shards
    assert shard_name(shard.pairs) == name and cache.holds(name, shard.pairs)
    for pair in shard.pairs:
        assert tuple(map(len, cache.read(pair))) == cache.lengths(pair)


def test_a_cache_of_the_commit_before_the_folders_is_read_to_the_bit():
    """Its folder has the name of the reference's fingerprint; see test_releases.py."""
    (folder,) = (DATA / "releases" / "92e9327" / "cache").iterdir()
    (file,) = folder.iterdir()
    pairs = [bytes(pair) for pair in load_file(file)["pairs"].numpy()]
    recorded = ReferenceCache(folder.parent, folder.name)
    recorded.open(recorded.names())
    checksum = xxhash.xxh3_64()
    for pair in pairs:
        assert pair in recorded
        for answer in recorded.read(pair):
            assert answer.dtype == torch.float32 and answer.shape[1] == 32
            checksum.update(tensor_bytes(answer))
    assert (len(pairs), checksum.hexdigest()) == (80, "662d4a9fbc13ebd9")
    assert file.name == shard_name(pairs)
