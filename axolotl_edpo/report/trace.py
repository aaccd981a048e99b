"""Reads pairs from the trace of a run (`edpo_log_pairs`), and from its scores.

A row of the trace is an observation: a pair in an optimizer step, before that step
changes the policy. Pairs are ranked by the mean over their observations of

    log_ratio = margin / β̃ = (log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)

in nats. If it is below 0, what the policy learned from other pairs contradicts the
label. Why this quantity? In examples/tiny 150 of 1500 labels are flipped. The table
shows how many of these are among the 100 pairs with the lowest mean of a quantity, and
in brackets the area under the ROC curve:

                        one epoch      three epochs
    log-ratio           39  (0.76)     46  (0.80)
    Δ+ - Δ-             38  (0.75)     31  (0.74)
    s                   19  (0.68)     26  (0.74)

For one epoch with two other seeds, the areas are 0.78 and 0.78 (log-ratio), 0.76 and
0.77 (Δ+ - Δ-), 0.69 and 0.70 (s). To first order, (Δ+ - Δ-) / 2ε is the log-ratio minus
the KL summed over the tokens of chosen, plus the KL summed over those of rejected. The
difference of these sums grows with the length of the answers. s is little more than the
sign of Δ+ - Δ-.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run_files import SCORES, TEXTS, THUMBNAILS, TRACE, TRACE_FILES

if TYPE_CHECKING:
    from pandas import DataFrame

TOKENS = tuple(f"{text}_tokens" for text in TEXTS)
# A curve has at most BINS points. Each is the mean of at least OBSERVATIONS rows.
BINS = 40
OBSERVATIONS = 3


def read_trace(output_dir: Path, last_step: int) -> "DataFrame | None":
    """Reads the observations up to a step, in the order of steps.

    Args:
        output_dir: `output_dir` of the run.
        last_step: The last step of the checkpoint that the run was read from. Later
            observations are left out.

    Returns:
        One row per observation, with the columns of the trace and `log_ratio`; None
        without observations.

    Raises:
        ValueError: Names a file that is damaged.
    """
    import pandas

    parts = [
        _read_file(file) for file in sorted((output_dir / TRACE).glob(TRACE_FILES))
    ]
    if not parts:
        return None
    trace = pandas.concat(parts, ignore_index=True)
    trace = trace[trace["global_step"] <= last_step]
    trace = trace.sort_values("global_step", kind="stable", ignore_index=True)
    return trace if len(trace) else None


def read_scores(output_dir: Path) -> "Iterator[tuple[str, dict[str, Any], DataFrame]]":
    """Reads what `axolotl edpo-score` wrote into the folder `edpo_scores` of a run.

    Args:
        output_dir: `output_dir` of the run.

    Yields:
        For each file its name without ending, its summary, and its rows as `read_trace`
        returns them.

    Raises:
        ValueError: Names a file that is damaged, or that something else wrote.
    """
    import pyarrow.parquet as pq

    for file in sorted((output_dir / SCORES).glob("*.parquet")):
        with _damage_named(file):
            summary = (pq.read_schema(file).metadata or {}).get(SCORES.encode())
        if summary is None:
            raise ValueError(f"{file}: not written by `axolotl edpo-score`: remove it")
        yield file.stem, json.loads(summary), _read_file(file)


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Within it, the error of a damaged Parquet file names the file."""
    try:
        yield
    except (OSError, ValueError) as error:  # Arrow's errors are subclasses
        raise ValueError(f"{file}: not a whole Parquet file: remove it") from error


def _read_file(file: Path) -> "DataFrame":
    import pandas

    with _damage_named(file):
        rows = pandas.read_parquet(file)
    # these are null in every row unless `edpo_control` is `epsilon`
    perturbed = ["plus", "minus", "step"]
    if THUMBNAILS not in rows:
        rows[THUMBNAILS] = None
    rows["log_ratio"] = rows["margin"] / rows["beta"]
    return rows.astype(dict.fromkeys(perturbed, "float64"))


def has_steps(trace: "DataFrame") -> bool:
    """Whether the trace has steps s: only with `edpo_control: epsilon`."""
    return bool(trace["step"].notna().any())


def by_pair(trace: "DataFrame") -> "DataFrame":
    """Groups the observations by pair.

    Args:
        trace: What `read_trace` returned.

    Returns:
        One row per pair, lowest mean log-ratio first:

            seen            number of observations
            smaller, larger shares of observations with s = +1 and s = -1, or NaN
            mean_step       mean of s; NaN if the trace has no s
            log_ratio       mean log-ratio, nats
            margin, kl      of the last observation
            *_tokens        numbers of tokens of prompt, chosen and rejected
            prompt, chosen, rejected    texts
            images          thumbnails, PNG files; None without images
    """
    steps = trace["step"]
    asks = {"smaller": steps > 0, "larger": steps < 0}
    trace = trace.assign(
        **{name: s.astype(float).where(steps.notna()) for name, s in asks.items()}
    )
    last = {name: (name, "last") for name in ("margin", "kl", *TOKENS)}
    # the first that is not null
    texts = {name: (name, "first") for name in (*TEXTS, THUMBNAILS)}
    pairs = trace.groupby("id", sort=False).agg(
        seen=("id", "size"),
        smaller=("smaller", "mean"),
        larger=("larger", "mean"),
        mean_step=("step", "mean"),
        log_ratio=("log_ratio", "mean"),
        **last,
        **texts,
    )
    return pairs.sort_values("log_ratio", kind="stable")


def margin_by_step(trace: "DataFrame") -> "dict[int | None, DataFrame]":
    """Mean margins over optimizer steps, for each value of s.

    Args:
        trace: What `read_trace` returned.

    Returns:
        A table for each s that occurs; one table under None if the trace has no s. The
        steps are divided into at most BINS ranges. A range is a row: the means of
        `global_step` and `margin`, and `count`, the number of observations. Ranges with
        fewer than OBSERVATIONS are left out.
    """
    steps = trace["global_step"]
    width = -(-(steps.max() - steps.min() + 1) // BINS)
    binned = trace.assign(bin=(steps - steps.min()) // width)
    if not has_steps(trace):
        return {None: _means(binned)}
    moves = {step: _means(binned[binned["step"] == step]) for step in (1, 0, -1)}
    return {step: means for step, means in moves.items() if len(means)}


def _means(binned: "DataFrame") -> "DataFrame":
    means = binned.groupby("bin").agg(
        global_step=("global_step", "mean"),
        margin=("margin", "mean"),
        count=("margin", "size"),
    )
    return means[means["count"] >= OBSERVATIONS]
