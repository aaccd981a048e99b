"""Pairs of a run, read from its trace (`edpo_log_pairs`).

A row of the trace is an observation: a pair in an optimizer step, before that step has
changed the policy. A pair is judged by the mean of

    log_ratio = margin / β̃ = (log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)

over its observations, in nats. Below 0, what the policy learned from other pairs speaks
against the label. In examples/tiny, where 150 of 1500 labels are flipped, so many are
among the lowest 100 (area under the ROC curve in brackets):

                        one epoch      three epochs
    log-ratio           39  (0.76)     46  (0.80)
    Δ+ - Δ-             38  (0.75)     31  (0.74)
    s                   19  (0.68)     26  (0.74)

With two other seeds, one epoch: 0.78 twice, 0.76 and 0.77, 0.69 and 0.70. To first
order, (Δ+ - Δ-) / 2ε is the log-ratio less the KL summed over chosen minus that summed
over rejected, which grows with the lengths of answers. s is hardly more than its sign.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..run_files import TEXTS, TRACE, TRACE_FILES

if TYPE_CHECKING:
    from pandas import DataFrame

TOKENS = tuple(f"{text}_tokens" for text in TEXTS)
# Points of a curve, at most, and observations that each is the mean of, at least.
BINS = 40
OBSERVATIONS = 3


def read_trace(output_dir: Path, last_step: int) -> "DataFrame | None":
    """Observations up to a step, in order.

    Args:
        output_dir: Of the run.
        last_step: The run is known up to here.

    Returns:
        A row per observation with the columns of the trace and `log_ratio`; None where
        nothing was traced.

    Raises:
        ValueError: Names a file that is not whole.
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
    trace["log_ratio"] = trace["margin"] / trace["beta"]
    return trace if len(trace) else None


def _read_file(file: Path) -> "DataFrame":
    import pandas

    try:
        rows = pandas.read_parquet(file)
    except (OSError, ValueError) as error:  # what Arrow raises are subclasses
        raise ValueError(f"{file}: not a whole Parquet file: remove it") from error
    # null in every row unless ε-DPO moved the pairs
    perturbed = ["plus", "minus", "step"]
    return rows.astype(dict.fromkeys(perturbed, "float64"))


def has_steps(trace: "DataFrame") -> bool:
    """Whether the pairs moved: `edpo_control: epsilon`."""
    return bool(trace["step"].notna().any())


def by_pair(trace: "DataFrame") -> "DataFrame":
    """What each pair did.

    Returns:
        A row per pair, lowest mean log-ratio first: `seen`, how often; `up`, `down`,
        shares of it with s = +1 and -1, and `mean_step`, all NaN without steps; mean
        `log_ratio`; `margin` and `kl` when it was seen last; tokens and texts.
    """
    steps = trace["step"]
    moved = {"up": steps > 0, "down": steps < 0}
    trace = trace.assign(
        **{name: s.astype(float).where(steps.notna()) for name, s in moved.items()}
    )
    last = {name: (name, "last") for name in ("margin", "kl", *TOKENS)}
    texts = {name: (name, "first") for name in TEXTS}  # the first that is not null
    pairs = trace.groupby("id", sort=False).agg(
        seen=("id", "size"),
        up=("up", "mean"),
        down=("down", "mean"),
        mean_step=("step", "mean"),
        log_ratio=("log_ratio", "mean"),
        **last,
        **texts,
    )
    return pairs.sort_values("log_ratio", kind="stable")


def margin_by_step(trace: "DataFrame") -> "dict[int | None, DataFrame]":
    """Mean margins over time, of the pairs that a step moved up, down or not.

    Returns:
        For each s that occurs, or for None where pairs do not move: mean `global_step`
        and `margin` of up to BINS stretches of steps, and their `count`, which is
        OBSERVATIONS at least.
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
