"""What a run leaves, and which checkpoint directories are complete. Needs no torch.

transformers writes `trainer_state.json` last, so a directory whose file is missing or
cut short belongs to a save that was interrupted: its weights, optimizer or β may be
missing, or left there by an earlier run.
"""

import json
from pathlib import Path

STATE = "trainer_state.json"
PREFIX = "checkpoint-"
# β and its settings in that file.
CONTROLLER = "EDPO"
# The trace: a folder beside the checkpoints, its files, and their columns of text.
TRACE, TRACE_FILES = "edpo_pairs", "steps-*-rank*.parquet"
TEXTS = ("prompt", "chosen", "rejected")


def is_complete(checkpoint: Path) -> bool:
    """Whether the save that wrote this directory came to its end."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint directories of a run, oldest step first, complete or not."""
    found = {
        int(step): path
        for path in output_dir.glob(f"{PREFIX}*")
        if (step := path.name.removeprefix(PREFIX)).isdigit()
    }
    return [found[step] for step in sorted(found)]


def last_complete(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return newest_complete(checkpoints(output_dir))


def newest_complete(found: list[Path]) -> Path | None:
    """The last complete directory of some, or None."""
    return next(filter(is_complete, reversed(found)), None)
