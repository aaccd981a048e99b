"""Runs the study: all cells of a grid that have no result yet, then tables and figures.

    python examples/study/run.py                  # small: two CPU cores
    python examples/study/run.py --grid sweep     # the second study
    python examples/study/run.py --grid large     # one GPU

Two workers, one thread each, import axolotl once and train cell after cell. Whatever
ends the study, finished cells stay; the same command goes on.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import cell  # noqa: E402
import grid  # noqa: E402
import page  # noqa: E402
import summary  # noqa: E402
import sweep  # noqa: E402
import sweep_page  # noqa: E402
from grid import HERE, Cell  # noqa: E402
from tqdm import tqdm  # noqa: E402

WORK = HERE / "work"
TIMES = "times.jsonl"
WORKERS = 2
GRIDS = {**grid.GRIDS, sweep_page.GRID: sweep.SWEEP}


def main() -> None:
    """Runs a grid and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=GRIDS, default="small")
    parser.add_argument("--workers", type=int, default=WORKERS)
    options = parser.parse_args()
    cells = GRIDS[options.grid].cells()
    try:
        run(cells, WORK, options.workers)
    except RuntimeError as error:
        sys.exit(str(error))
    summary.collect(cells, WORK, options.grid, noted_seconds(WORK))
    if options.grid == sweep_page.GRID:
        sweep_page.main()
    else:
        page.write(options.grid)


def run(cells: Sequence[Cell], work: Path, workers: int = WORKERS) -> int:
    """Makes the results that are missing.

    Args:
        cells: Any.
        work: Folder of results and worlds.
        workers: Processes.

    Returns:
        How many cells were run.

    Raises:
        RuntimeError: A cell failed; the message names its recipe. Those that were
            running are finished and kept, the others are not begun.
    """
    missing = [c for c in cells if not cell.result_file(work, c).exists()]
    if not missing:
        return 0
    started = perf_counter()
    worlds = list(dict.fromkeys(c.world for c in missing))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _begin_worker) as pool:
        _all(pool, partial(cell.build_world, work), worlds, "worlds")
        _all(pool, partial(cell.run, work), missing, "cells")
    _note(work, len(missing), perf_counter() - started)
    return len(missing)


def noted_seconds(work: Path) -> float:
    """What all runs of the study took that came to their end."""
    log = work / TIMES
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(json.loads(line)["seconds"] for line in lines)


def _all(
    pool: ProcessPoolExecutor, task: Callable, items: Sequence[Any], what: str
) -> None:
    """Does all, with a bar that shows the time left; the first error ends it."""
    futures = [pool.submit(task, item) for item in items]
    with tqdm(total=len(items), desc=what, unit=what[:-1], smoothing=0.05) as bar:
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker() -> None:
    """One thread for two small models on two cores; ends with the study.

    Without the second, the workers of a killed study would wait for it for ever.
    """
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _note(work: Path, cells: int, seconds: float) -> None:
    with (work / TIMES).open("a") as log:
        log.write(json.dumps({"cells": cells, "seconds": round(seconds)}) + "\n")


if __name__ == "__main__":
    main()
