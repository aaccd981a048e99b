"""Names of the files of a run, and which checkpoints are complete. Needs no torch.

transformers writes `trainer_state.json` last. So if that file is missing or cut short,
the save was interrupted. Weights, optimizer or β may then be missing, or be left from
an earlier run.
"""

import json
from pathlib import Path

STATE = "trainer_state.json"
PREFIX = "checkpoint-"
# The key in STATE below which β and its settings are saved.
CONTROLLER = "EDPO"
# The key of an entry of `log_history` in STATE that holds lines about overfitting or
# collapse, by name.
WARNINGS = "edpo_warnings"
# The trace of pairs: its folder in `output_dir`, and its files.
TRACE, TRACE_FILES = "edpo_pairs", "steps-*-rank*.parquet"
# What `axolotl edpo-score` writes: the folder in `output_dir` in which the report looks
# for its files, and the key in a file's metadata that holds the summary.
SCORES = "edpo_scores"
# Columns that hold text, and that of thumbnails, which runs without images lack.
TEXTS = ("prompt", "chosen", "rejected")
THUMBNAILS = "images"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved to its end."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint directories of a run, complete or not, by ascending step."""
    by_step = {
        int(step): path
        for path in output_dir.glob(f"{PREFIX}*")
        if (step := path.name.removeprefix(PREFIX)).isdigit()
    }
    return [by_step[step] for step in sorted(by_step)]


def last_complete(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return newest_complete(checkpoints(output_dir))


def newest_complete(oldest_first: list[Path]) -> Path | None:
    """The newest complete one of these checkpoints, or None."""
    return next(filter(is_complete, reversed(oldest_first)), None)
