"""Ranks that die, disks that fill up, bytes that flip: plugins of axolotl for tests.

    plugins: [axolotl_edpo.EDPOPlugin, helpers.ranks.CpuRanks,
              helpers.killed_runs.Dying]
    dies: {rank: 1, step: 7}     # or `save: 6`, in the checkpoint of that step,
                                 # or `piece: 30`, in that piece of a cache
    plugins: [..., helpers.killed_runs.FillingDisk]
    fills: 5                     # the disk of a cache, after so many pieces
    plugins: [..., helpers.killed_runs.Unreadable, helpers.killed_runs.OwnDisks]
    plugins: [..., helpers.killed_runs.Flipping]
    flips: 3                     # a bit in all pieces of a cache, after that step

SIGKILL is what a rank gets that is out of memory, or whose machine is gone.
`train_until_killed` is for a run of one process.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import yaml
from axolotl.integrations.base import BasePlugin
from transformers import Trainer, TrainerCallback

from axolotl_edpo.reference import hidden_cache as store
from axolotl_edpo.reference import precompute
from helpers import tiny

# longer than the others need for the rest of a tiny checkpoint
OTHERS_GO_ON = 1.0
# a pair or two of `tiny.save_pairs`
SMALL_PIECE = 64
# less than any such piece takes
LEFT_ON_DISK = 4096


def train_until_killed(folder: Path, keys: dict, step: int) -> None:
    """Trains a recipe in a process of its own, which is killed after a step."""
    plugins = [*keys["plugins"], "helpers.killed_runs.Dying"]
    dying = {**keys, "plugins": plugins, "dies": {"rank": 0, "step": step}}
    tests = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-m", __name__, str(tiny.write(folder, dying))],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        },
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]


class Dying(BasePlugin):
    """Kills its process where the recipe's `dies` says."""

    def register(self, cfg: dict) -> None:
        """Takes `dies` away before axolotl looks at the recipe."""
        self._dies = cfg.pop("dies", None) or {}

    def post_trainer_create(self, cfg, trainer) -> None:
        """Puts the end where it belongs."""
        if self._dies.get("rank") != trainer.args.process_index:
            return
        if "step" in self._dies:
            trainer.add_callback(_AtStep(self._dies["step"]))
        if "save" in self._dies:
            _cut_short(self._dies["save"])
        if "piece" in self._dies:
            _tear(self._dies["piece"])


class _AtStep(TrainerCallback):
    def __init__(self, step: int):
        self._step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            _die()


def _cut_short(step: int) -> None:
    """In the checkpoint of a step, this rank's own file is only begun."""
    write = Trainer._save_rng_state

    def begin(trainer, folder: str) -> None:
        write(trainer, folder)
        if trainer.state.global_step == step:
            file = Path(folder) / f"rng_state_{trainer.args.process_index}.pth"
            file.write_bytes(file.read_bytes()[:100])
            time.sleep(OTHERS_GO_ON)
            _die()

    Trainer._save_rng_state = begin


def _tear(piece: int) -> None:
    """Of a piece of a cache, half is written."""
    written, write = count(1), Path.write_bytes

    def begin(path: Path, data: bytes) -> int:
        if path.suffix == store.PARTIAL and next(written) == piece:
            write(path, data[: len(data) // 2])
            _die()
        return write(path, data)

    Path.write_bytes = begin


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SmallPieces(BasePlugin):
    """A pass over a few pairs writes many pieces of a cache."""

    def register(self, cfg: dict) -> None:
        """Before any is cut."""
        precompute.PIECE_TOKENS = SMALL_PIECE


class FillingDisk(BasePlugin):
    """After `fills` pieces, what others wrote left no room for the next."""

    def register(self, cfg: dict) -> None:
        """Takes `fills` away before axolotl looks at the recipe."""
        last, written, write = cfg.pop("fills"), count(1), store.Store.write

        def then_fill(own: store.Store, *piece) -> None:
            write(own, *piece)
            if next(written) == last:
                fill(own.folder.parent / f"filler-{os.getpid()}")

        store.Store.write = then_fill


def fill(path: Path) -> None:
    """A file that takes what is free on its disk, but for LEFT_ON_DISK."""
    with path.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(LEFT_ON_DISK)):
                pass
        file.truncate(max(file.tell() - LEFT_ON_DISK, 0))


class Unreadable(BasePlugin):
    """One rank cannot read the files of a cache."""

    def register(self, cfg: dict) -> None:
        """With an error that nobody expects."""

        def holds(*_) -> bool:
            raise RuntimeError("this rank cannot read")

        if os.environ["RANK"] == "1":
            store.Store.holds = holds


class OwnDisks(BasePlugin):
    """Each rank has a disk of its own, as on machines that share none."""

    def register(self, cfg: dict) -> None:
        """The cache is on it."""
        cfg["edpo_reference_cache"] += f"/disk{os.environ['RANK']}"


class Flipping(BasePlugin):
    """A disk or a neighbour changes what a run has checked and opened."""

    def register(self, cfg: dict) -> None:
        """Takes `flips` away before axolotl looks at the recipe."""
        self._step = cfg.pop("flips")

    def post_trainer_create(self, cfg, trainer) -> None:
        """Before the next step asks for its pairs."""
        trainer.add_callback(_FlipAfter(self._step, trainer))


class _FlipAfter(TrainerCallback):
    def __init__(self, step: int, trainer):
        self._step, self._trainer = step, trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            for piece in self._trainer.store.folder.iterdir():
                _flip_in_the_middle(piece)


def _flip_in_the_middle(path: Path) -> None:
    """In place, as an open file sees it."""
    middle = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 1]))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    tiny.train(path.parent, yaml.safe_load(path.read_text()))
