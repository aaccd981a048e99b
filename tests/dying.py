"""A rank that dies: a plugin of axolotl for tests of what the others do then.

    plugins: [axolotl_edpo.EDPOPlugin, ranks.CpuRanks, dying.Dying]
    dies: {rank: 1, step: 7}     # or `save: 6`, in the checkpoint of that step

SIGKILL is what a rank gets that is out of memory, or whose machine is gone.
"""

import os
import signal
import time
from pathlib import Path

from axolotl.integrations.base import BasePlugin
from transformers import Trainer, TrainerCallback

# longer than the others need for the rest of a tiny checkpoint
OTHERS_GO_ON = 1.0


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


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
