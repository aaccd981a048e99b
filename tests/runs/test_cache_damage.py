"""Nothing that happens to a cache of the reference ends in a wrong training run.

Killed passes, changed bytes, full disks, two runs at once: a run ends as without a
cache, or stops and says why.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import processes, ranks, tiny
from helpers.engines import engine, series
from helpers.killed_runs import SMALL_SHARD
from helpers.tiers import first, only
from safetensors.torch import load_file

from axolotl_edpo.reference import precompute
from axolotl_edpo.reference.cache import (
    ABANDONED_SECONDS,
    PARTIAL,
    SUFFIX,
    Damaged,
    ReferenceCache,
)

# steps of 4 pairs; Adam's default epsilon would make updates of rounding errors
COMMON = dict(micro_batch_size=2, adam_epsilon=1e-4, ddp_timeout=60)
DECIDED = ("kl/beta", "kl/avg_steps", "kl/p_epsilon_steps", "kl/n_epsilon_steps")
KILLED = "helpers.killed_runs."
PLUGINS = ["axolotl_edpo.EDPOPlugin", "helpers.killed_runs.SmallShards"]
IN_USE = r"ValueError: {}/\w+/\w+\.safetensors was damaged while it was in use"


class Run(NamedTuple):
    """What a run logged, and where its model is."""

    log: list[dict]
    out: Path

    def series(self, name: str) -> list[float]:
        return series({"log": self.log}, name)


class Cell:
    """A recipe over so many pairs, its run without a cache, and a whole cache."""

    def __init__(self, folder: Path, count: int, **model):
        folder.mkdir()
        self.count, self._prepared = count, str(folder / "prepared")
        self.whole = folder / "cache"
        self._model = tiny.save_model(folder / "model", **model)
        self._pairs = tiny.save_pairs(folder / "pairs.jsonl", count)
        self.clean = self.train(folder / "clean")
        self.train(folder / "made", self.whole, max_steps=1)

    def recipe(self, folder: Path, cache: Path | None = None, **keys) -> dict:
        """Of a run that keeps a cache there."""
        keys = {**COMMON, "dataset_prepared_path": self._prepared, **keys}
        if cache:
            keys |= {"precompute_ref_log_probs": True}
            keys |= {"edpo_reference_cache": str(cache)}
        return tiny.recipe(folder, self._model, self._pairs, **keys)

    def train(self, folder: Path, cache: Path | None = None, **keys) -> Run:
        """In this process."""
        folder.mkdir(exist_ok=True)
        trainer = tiny.train(folder, self.recipe(folder, cache, **keys))
        return Run(trainer.state.log_history, folder / "out")

    def start(self, folder: Path, cache: Path, *plugins: str, count: int = 1, **keys):
        """In processes of its own, with more plugins."""
        keys = {"plugins": [*PLUGINS, *plugins], **keys}
        return ranks.start(folder, self.recipe(folder, cache, **keys), count)


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    """In this process; `killed_runs.SmallShards` in others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "SHARD_TOKENS", SMALL_SHARD)
        yield


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Four steps, of which the last three read a cache."""
    return Cell(tmp_path_factory.mktemp("cells") / "few", 16)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same pairs, and another model."""
    folder = tmp_path_factory.mktemp("cells") / "other"
    return Cell(folder, 16, initializer_range=0.1)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A pass of many shards."""
    return Cell(tmp_path_factory.mktemp("cells") / "many", 200)


@pytest.fixture
def cache(few, tmp_path):
    """A copy of the few pairs' whole cache."""
    return Path(shutil.copytree(few.whole, tmp_path / "cache"))


def shards(cache: Path) -> list[Path]:
    """The shards of a cache of one reference."""
    return sorted(cache.glob(f"*/*{SUFFIX}"))


def contents(cache: Path) -> dict[str, bytes]:
    return {shard.name: shard.read_bytes() for shard in shards(cache)}


def stamps(cache: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    found = {shard.name: shard.stat() for shard in shards(cache)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def partials(cache: Path) -> list[Path]:
    return [*cache.rglob(f"*{PARTIAL}")]


def damages(cache: Path) -> dict[str, str]:
    """What is wrong with each shard."""
    (folder,) = {shard.parent for shard in shards(cache)}
    opened, found = ReferenceCache(cache, folder.name), {}
    for name in opened.names():
        found[name] = ""
        try:
            opened.holds(name, Everything())
        except Damaged as error:
            found[name] = str(error)
    return found


class Everything:
    """All pairs."""

    def __contains__(self, pair: bytes) -> bool:
        return True


def assert_same_run(run: Run, clean: Run) -> None:
    """The same decisions to the last bit, and the same model but for rounding."""
    for name in DECIDED:
        assert run.series(name) == clean.series(name), name
    for name in ("loss", "rewards/margins", "kl/policy_ref", "grad_norm"):
        expected = pytest.approx(clean.series(name), rel=1e-4, abs=1e-6)
        assert run.series(name) == expected, name
    own, other = (load_file(r.out / "model.safetensors") for r in (run, clean))
    assert own.keys() == other.keys()
    for name in own:
        torch.testing.assert_close(own[name], other[name], rtol=0, atol=1e-6)


def forked(folder: Path) -> Run:
    """The run of a single process that was started there."""
    (result,) = ranks.results(folder, 1)
    return Run(result["log"], folder / "out")


# --- kills ------------------------------------------------------------------------


class Killed(NamedTuple):
    """A cache whose pass was killed, and what was there each time."""

    cache: Path
    seen: list[dict[str, tuple[int, int]]]


def kill(context, cache: Path, count: int, delay: float) -> None:
    """When there are so many shards, and a moment later."""
    (process,) = context.processes
    while process.is_alive() and len(shards(cache)) < count:
        time.sleep(1e-3)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module", params=first([2, 20]), ids="{} kills".format)
def killed(request, many, tmp_path_factory):
    """So often, at random moments from its first shard on, till most are there."""
    folder, rng, seen = tmp_path_factory.mktemp("killed"), random.Random(1), []
    cache, whole = folder / "cache", stamps(many.whole)
    first, *_, last = sorted(written for _, written in whole.values())
    a_shard = (last - first) / 1e9 / len(whole)
    for count in sorted(rng.sample(range(1, len(whole) * 4 // 5), request.param)):
        due = max(count, len(shards(cache)) + 1)
        kill(many.start(folder, cache), cache, due, 2 * rng.random() * a_shard)
        seen.append(stamps(cache))
    torn = many.start(folder, cache, KILLED + "Dying", dies={"rank": 0, "shard": 3})
    assert [code for code, _ in processes.ended(torn)] == [-signal.SIGKILL]
    seen.append(stamps(cache))
    return Killed(cache, seen)


def test_a_killed_pass_leaves_whole_shards(many, killed):
    whole = contents(many.whole)
    counts = [len(seen) for seen in killed.seen]
    hit = [count for count in counts if 0 < count < len(whole)]
    assert len(hit) > len(counts) * 3 // 4, counts
    assert counts[-1] < len(whole)
    assert contents(killed.cache).items() <= whole.items()


def test_after_kills_a_run_goes_on_and_ends_as_without_a_cache(many, killed, tmp_path):
    """What was begun is in nobody's way, and removed when it is old."""
    torn = partials(killed.cache)
    run = many.train(tmp_path, killed.cache)
    assert_same_run(run, many.clean)
    assert contents(killed.cache) == contents(many.whole)
    now = stamps(killed.cache)
    for seen in killed.seen:
        assert seen.items() <= now.items()
    assert torn and torn == partials(killed.cache)
    old = time.time() - ABANDONED_SECONDS - 1
    for partial in torn:
        os.utime(partial, (old, old))
    assert not any(damages(killed.cache).values())
    assert not partials(killed.cache)


# --- bytes ------------------------------------------------------------------------


def _flip(rng: random.Random, shard: Path, end: int | None = None) -> set[str]:
    """One to eight bytes, anywhere or up to there."""
    data = bytearray(shard.read_bytes())
    for place in rng.sample(range(end or len(data)), rng.randint(1, 8)):
        data[place] ^= rng.randint(1, 255)
    shard.write_bytes(data)
    return {shard.name}


def any_bytes(rng, cache, foreign):
    return _flip(rng, rng.choice(shards(cache)))


def header(rng, cache, foreign):
    shard = rng.choice(shards(cache))
    return _flip(rng, shard, header_end(shard.read_bytes()))


def header_end(shard: bytes) -> int:
    """Of a safetensors file: 8 bytes of length, then JSON."""
    return 8 + int.from_bytes(shard[:8], "little")


def every_shard(rng, cache, foreign):
    return set().union(*(_flip(rng, shard) for shard in shards(cache)))


def truncated(rng, cache, foreign):
    shard = rng.choice(shards(cache))
    os.truncate(shard, rng.randrange(shard.stat().st_size))
    return {shard.name}


def emptied(rng, cache, foreign):
    shard = rng.choice(shards(cache))
    os.truncate(shard, 0)
    return {shard.name}


def appended(rng, cache, foreign):
    shard = rng.choice(shards(cache))
    shard.write_bytes(shard.read_bytes() + rng.randbytes(rng.randint(1, 99)))
    return {shard.name}


def swapped(rng, cache, foreign):
    """A shard says itself which pairs it holds: nothing is lost."""
    one, another = rng.sample(shards(cache), 2)
    between = one.rename(one.with_suffix(".between"))
    another.rename(one)
    between.rename(another)
    return set()


def another_models(rng, cache, foreign):
    """Of the same pairs."""
    shard = rng.choice(shards(cache))
    shutil.copy(next(foreign.glob(f"*/{shard.name}")), shard)
    return {shard.name}


def another_models_beside(rng, cache, foreign):
    folder = shards(cache)[0].parent
    copied = folder / f"{rng.randbytes(16).hex()}{SUFFIX}"
    shutil.copy(rng.choice(shards(foreign)), copied)
    return {copied.name}


DAMAGES = {
    any_bytes: 18,
    header: 14,
    every_shard: 2,
    truncated: 4,
    emptied: 2,
    appended: 4,
    swapped: 2,
    another_models: 2,
    another_models_beside: 2,
}


@pytest.mark.parametrize(
    ("damage", "seed"),
    only(
        [(damage, seed) for damage, count in DAMAGES.items() for seed in range(count)],
        lambda damage, seed: seed == 0,
    ),
)
def test_a_damaged_shard_is_named_and_computed_anew(
    few, other, cache, tmp_path, caplog, damage, seed
):
    """It alone, to the last bit; and the run ends as without a cache."""
    rng = random.Random(f"{damage.__name__} {seed}")
    damaged = damage(rng, cache, other.whole)
    whole, hurt, before = contents(few.whole), contents(cache), stamps(cache)
    run = few.train(tmp_path / "run", cache)
    assert_same_run(run, few.clean)
    warned = re.findall(r"(\w+\.safetensors) is damaged: ", caplog.text)
    assert sorted(warned) == sorted(damaged)
    now = {name: whole[name] if name in damaged else hurt[name] for name in whole}
    assert contents(cache) == now
    untouched = stamps(cache).items() & before.items()
    assert {name for name, _ in untouched} == whole.keys() - damaged


@pytest.mark.parametrize("step", first([2, 1]))
def test_damage_while_a_run_trains_stops_it(few, cache, tmp_path, step):
    """Then what the message advises gives the run without a cache."""
    keys = dict(save_strategy="steps", save_steps=1, auto_resume_from_checkpoints=True)
    context = few.start(tmp_path, cache, KILLED + "Flipping", flips=step, **keys)
    ((code, error),) = processes.ended(context)
    assert code == 1, error
    assert re.search(IN_USE.format(cache), error.splitlines()[-1]), error
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    saved = sorted(path.name for path in out.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{i + 1}" for i in range(step)]
    assert all(damages(cache).values())
    assert_same_run(few.train(tmp_path, cache, **keys), few.clean)
    assert contents(cache) == contents(few.whole)


# --- disks ------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of so many KiB; skipped for whoever may not."""
    folder, sudo = tmp_path / "disk", ["sudo", "-n"] if os.geteuid() else []
    folder.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        command = [*sudo, "mount", *options.split(), str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a disk: root, or sudo")
        mounted.append(options)
        return folder

    yield mount
    if mounted:
        subprocess.run([*sudo, "umount", "--lazy", folder], check=True)
    assert str(folder) not in Path("/proc/mounts").read_text()


def test_a_disk_that_is_too_small_is_refused_before_the_pass(few, disk, tmp_path):
    small = disk("-t tmpfs -o size=64k tmpfs")
    with pytest.raises(ValueError) as refused:
        few.train(tmp_path, small)
    message = str(refused.value)
    assert "\n" not in message
    assert re.fullmatch(
        r"`precompute_ref_log_probs: true` does not fit: 16 pairs, .* × 32 × float32 = "
        rf".* KiB in {small}/\w+, where 64.00 KiB are free. Free .* KiB, name another "
        r"disk with `edpo_reference_cache`, or remove `precompute_ref_log_probs`",
        message,
    )
    assert not [path for path in small.rglob("*") if path.is_file()]
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["alone", "ddp", "zero3"])
def test_a_disk_that_fills_up_stops_every_rank_and_later_the_pass_goes_on(
    few, disk, tmp_path, name
):
    full = disk("-t tmpfs -o size=512k tmpfs")
    count, keys = (1, {}) if name == "alone" else (2, engine(tmp_path, name))
    keys |= dict(gradient_accumulation_steps=2 // count, fills=3)
    for code, error in processes.ended(
        few.start(tmp_path, full, KILLED + "FillingDisk", count=count, **keys)
    ):
        assert code == 1, error
        last = error.splitlines()[-1]
        assert last.startswith("ValueError: `precompute_ref_log_probs: t"), error
        assert "[Errno 28] No space left on device" in last
        assert "`edpo_reference_cache`" in last
    assert not partials(full) and not (tmp_path / "out" / "model.safetensors").exists()
    before = stamps(full)
    assert len(before) >= 3 and not any(damages(full).values())
    for filler in full.glob("filler*"):
        filler.unlink()
    assert_same_run(few.train(tmp_path / "again", full), few.clean)
    assert before.items() < stamps(full).items()


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("Unreadable", "cannot be used (this rank cannot read)"),
        ("OwnDisks", "rank 1 does not see there what rank 0 wrote"),
    ],
)
def test_what_stops_one_rank_stops_all(few, cache, tmp_path, plugin, message):
    keys = dict(gradient_accumulation_steps=1)
    context = few.start(tmp_path, cache, KILLED + plugin, count=2, **keys)
    for code, error in processes.ended(context):
        assert code == 1, error
        last = error.splitlines()[-1]
        assert last.startswith("ValueError: `precompute_ref_log_probs: t"), error
        assert message in last


def test_a_whole_cache_may_be_on_a_disk_that_cannot_be_written(
    few, cache, disk, tmp_path
):
    """Nor what a killed run left there be removed."""
    left = shards(cache)[0].with_suffix(PARTIAL)
    left.touch()
    os.utime(left, (0, 0))
    shared = disk(f"--bind {cache}")
    disk("-o remount,bind,ro")
    assert_same_run(few.train(tmp_path / "run", shared), few.clean)


def test_a_damaged_cache_on_a_disk_that_cannot_be_written_is_refused(
    few, cache, disk, tmp_path
):
    os.truncate(shards(cache)[0], 100)
    shared = disk(f"--bind {cache}")
    disk("-o remount,bind,ro")
    message = r"cannot be used \(\[Errno 30\] Read-only.* with `edpo_reference_cache`"
    with pytest.raises(ValueError, match=message):
        few.train(tmp_path / "run", shared)


def test_a_folder_that_cannot_be_made_is_refused(few, tmp_path):
    file = tmp_path / "file"
    file.touch()
    message = r"cannot be used \(.*Not a directory.* with `edpo_reference_cache`"
    with pytest.raises(ValueError, match=message):
        few.train(tmp_path, file / "cache")
    assert not (tmp_path / "out" / "model.safetensors").exists()


# --- several runs -----------------------------------------------------------------


def test_two_runs_build_one_cache_at_once(many, tmp_path, caplog):
    """Both end as without a cache; a third has nothing left to compute."""
    cache, folders = tmp_path / "cache", [tmp_path / name for name in "ab"]
    contexts = [many.start(folder, cache) for folder in folders]
    assert [processes.ended(context) for context in contexts] == [[(0, "")]] * 2
    for folder in folders:
        log = (folder / "out" / "debug.log").read_text()
        assert "Reference cache: computing" in log
        assert_same_run(forked(folder), many.clean)
    assert not any(damages(cache).values()) and not partials(cache)
    before = stamps(cache)
    assert_same_run(many.train(tmp_path / "c", cache), many.clean)
    assert f"{many.count} of {many.count} pairs are in" in caplog.text
    assert "computing" not in caplog.text and stamps(cache) == before


def test_a_shard_that_another_run_repaired_meanwhile_is_kept(
    few, cache, tmp_path, monkeypatch
):
    """To look at a large cache takes minutes: what was found then may be past."""
    shard, look = shards(cache)[0], ReferenceCache.holds
    whole = shard.read_bytes()
    os.truncate(shard, 100)

    def kept(*_) -> None:
        pytest.fail("it is whole")

    def and_then_it_is_repaired(opened: ReferenceCache, *asked) -> bool:
        try:
            return look(opened, *asked)
        finally:
            repaired = shard.with_suffix(".repaired")
            repaired.write_bytes(whole)
            repaired.replace(shard)

    monkeypatch.setattr(ReferenceCache, "holds", and_then_it_is_repaired)
    monkeypatch.setattr(ReferenceCache, "discard", kept)
    assert_same_run(few.train(tmp_path / "run", cache), few.clean)
    assert contents(cache) == contents(few.whole)
