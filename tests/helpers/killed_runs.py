"""Plugins of axolotl that damage a run: ranks die, disks fill up, bits flip.

A recipe names one in `plugins:` and says in a key of the plugin's own what happens:

    plugins: [axolotl_edpo.EDPOPlugin, helpers.ranks.CpuRanks,
              helpers.killed_runs.Dying]
    dies: {rank: 1, step: 7}     # or `save: 6`, in the checkpoint of that step,
                                 # or `shard: 30`, in that shard of a cache
    plugins: [..., helpers.killed_runs.FillingDisk]
    fills: 5                     # the disk of a cache, after so many shards
    plugins: [..., helpers.killed_runs.Unreadable, helpers.killed_runs.OwnDisks]
    plugins: [..., helpers.killed_runs.Flipping]
    flips: 3                     # a bit in all shards of a cache, after that step

A rank dies by SIGKILL, as one that is out of memory. `train_until_killed` kills a run
of one process.
"""

import os
import signal
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from axolotl.integrations.base import BasePlugin
from torch.multiprocessing import ProcessExitedException
from transformers import Trainer, TrainerCallback

from axolotl_edpo.reference import precompute
from axolotl_edpo.reference.cache import PARTIAL, ReferenceCache
from helpers import ranks

# Seconds in which the other ranks write the rest of a tiny checkpoint.
OTHERS_GO_ON = 1.0
# Tokens of a pair or two of `tiny.save_pairs`.
SMALL_SHARD = 64
# Bytes; any such shard has more.
LEFT_ON_DISK = 4096


def train_until_killed(folder: Path, keys: dict, step: int) -> None:
    """Trains a recipe in another process and kills it.

    Args:
        folder: Where the recipe is written.
        keys: The recipe.
        step: The optimizer step after which the process dies.
    """
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        ranks.run(folder, dying(keys, rank=0, step=step), 1)


def dying(keys: dict, **dies: int) -> dict:
    """A copy of a recipe in which `Dying` kills a rank.

    Args:
        keys: The recipe.
        **dies: The rank, and the step, save or shard at which it dies.
    """
    plugins = [*keys["plugins"], "helpers.killed_runs.Dying"]
    return {**keys, "plugins": plugins, "dies": dies}


class Dying(BasePlugin):
    """Kills its process where the recipe's `dies` says."""

    def register(self, cfg: dict) -> None:
        """Removes `dies` before axolotl validates the recipe."""
        self._dies = cfg.pop("dies", None) or {}

    def post_trainer_create(self, cfg, trainer) -> None:
        """Makes the rank that is to die do so at the given place."""
        if self._dies.get("rank") != trainer.args.process_index:
            return
        if "step" in self._dies:
            trainer.add_callback(_AtStep(self._dies["step"]))
        if "save" in self._dies:
            _cut_short(self._dies["save"])
        if "shard" in self._dies:
            _tear(self._dies["shard"])


class _AtStep(TrainerCallback):
    """Kills the process when a step begins."""

    def __init__(self, step: int):
        self._step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            _die()


def _cut_short(step: int) -> None:
    """In the checkpoint of a step, kills the rank with its file half written."""
    write = Trainer._save_rng_state

    def write_a_part(trainer, folder: str) -> None:
        write(trainer, folder)
        if trainer.state.global_step == step:
            file = Path(folder) / f"rng_state_{trainer.args.process_index}.pth"
            file.write_bytes(file.read_bytes()[:100])
            time.sleep(OTHERS_GO_ON)
            _die()

    Trainer._save_rng_state = write_a_part


def _tear(number: int) -> None:
    """Kills the rank when half of a shard is written: of the shard of this number."""
    written, write = count(1), Path.write_bytes

    def write_a_half(path: Path, data: bytes) -> int:
        if path.suffix == PARTIAL and next(written) == number:
            write(path, data[: len(data) // 2])
            _die()
        return write(path, data)

    Path.write_bytes = write_a_half


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SmallShards(BasePlugin):
    """Shards of a cache are so small that a few pairs fill many."""

    def register(self, cfg: dict) -> None:
        """Sets the size before the first shard is filled."""
        precompute.SHARD_TOKENS = SMALL_SHARD


class FillingDisk(BasePlugin):
    """The disk of a cache is full after `fills` shards."""

    def register(self, cfg: dict) -> None:
        """Removes `fills` before axolotl validates the recipe."""
        last, written, write = cfg.pop("fills"), count(1), ReferenceCache.write

        def then_fill(cache: ReferenceCache, *shard) -> None:
            write(cache, *shard)
            if next(written) == last:
                fill(cache.folder.parent / f"filler-{os.getpid()}")

        ReferenceCache.write = then_fill


def fill(path: Path) -> None:
    """Writes a file that leaves LEFT_ON_DISK bytes free on its disk."""
    with path.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(LEFT_ON_DISK)):
                pass
        file.truncate(max(file.tell() - LEFT_ON_DISK, 0))


class Unreadable(BasePlugin):
    """Rank 1 cannot read the files of a cache."""

    def register(self, cfg: dict) -> None:
        """Makes every read of a shard fail there."""

        def holds(*_) -> bool:
            raise OSError("this rank cannot read")

        if os.environ["RANK"] == "1":
            ReferenceCache.holds = holds


class OwnDisks(BasePlugin):
    """Each rank has a disk of its own, as on machines that share none."""

    def register(self, cfg: dict) -> None:
        """Names a folder per rank as the cache."""
        cfg["edpo_reference_cache"] += f"/disk{os.environ['RANK']}"


class Flipping(BasePlugin):
    """A bit flips in every shard that a run has checked and opened."""

    def register(self, cfg: dict) -> None:
        """Removes `flips` before axolotl validates the recipe."""
        self._step = cfg.pop("flips")

    def post_trainer_create(self, cfg, trainer) -> None:
        """Flips before the next step reads its pairs."""
        trainer.add_callback(_FlipAfter(self._step, trainer))


class _FlipAfter(TrainerCallback):
    """Flips a bit in every shard after a step."""

    def __init__(self, step: int, trainer):
        self._step, self._trainer = step, trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            for shard in self._trainer.reference.cache.folder.iterdir():
                _flip_in_the_middle(shard)


def _flip_in_the_middle(path: Path) -> None:
    """Flips a bit in place, so that a process that mapped the file sees it."""
    middle = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 1]))
