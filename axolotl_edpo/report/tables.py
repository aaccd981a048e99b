"""The tables and sentences of the page."""

import math
from collections.abc import Callable
from typing import Any

from . import logged, runs, trace
from .content import Pairs, Scored
from .logged import EVAL, Metric
from .runs import Run, Series

# Number of pairs in each of the tables `doubtful` and `surest`.
SHOWN = 10
# A text is folded after this many characters.
FOLD = 280
CONTROLS: dict[str | None, str] = {
    "epsilon": "ε-DPO, a β per pair (edpo_control: epsilon)",
    "fixed": "one β throughout, DPO by default (edpo_control: fixed)",
    "batch_margin": "β-DPO, a β per step from its margins (edpo_control: batch_margin)",
    None: "none of `rl: edpo`",
}
SETTINGS = {
    "epsilon": "ε",
    "beta_mean": "Mean of β̃",
    "margin_weight": "Margin weight α",
    "margin_momentum": "Margin momentum",
    "margin_keep": "Share of pairs kept",
}
MISSING = {
    logged.BETA: "β",
    logged.KL: "KL(π‖π_ref)",
    logged.SMALLER: "shares of pairs for a smaller or larger β",
    logged.MARGIN: "rewards",
    logged.RATE: "learning rate",
}


def number(value: float | None) -> str:
    """A value with four significant digits; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.4g}".replace("-", "−")


def percent(share: float) -> str:
    """A share as a percentage; a dash for NaN."""
    return "–" if math.isnan(share) else f"{share:.0%}"


# --- runs --------------------------------------------------------------------------


def facts(run: Run) -> list[tuple[str, str]]:
    """Facts about a run: the name of each, and its value."""
    control = CONTROLS.get(run.control) or str(run.control)
    settings = {key: run.controller[key] for key in SETTINGS if key in run.controller}
    return [
        ("Run", str(run.path)),
        ("Control", control),
        ("Model", runs.model_name(run) or "–"),
        ("β", _beta_change(run)),
        *((SETTINGS[key], str(value)) for key, value in settings.items()),
        ("Epochs", number(run.state.get("epoch"))),
    ]


def _beta_change(run: Run) -> str:
    betas = (run.controller.get("initial_beta"), run.controller.get("beta"))
    return " → ".join(map(number, betas)) if run.controller else "–"


def notes(run: Run) -> list[str]:
    """Sentences: warnings of a run, and what it did not save, log or evaluate."""
    lines = [warning.line for warning in run.warnings]
    if run.skipped:
        lines.append(f"Not saved to the end, and not read: {', '.join(run.skipped)}.")
    missing = [label for metric, label in MISSING.items() if not run.has(metric)]
    if missing:
        lines.append(f"Not logged by this run: {', '.join(missing)}.")
    if not any(name.startswith(EVAL) for name in run.logged()):
        lines.append("No evaluation up to here: curves are of training pairs only.")
    return lines


def first_and_last(run: Run) -> list[tuple[str, list[str]]]:
    """A row per metric: its label, then first → last of training and of evaluation."""
    return [
        (metric.label, [_change(run.series(pre + metric.name)) for pre in ("", EVAL)])
        for metric in logged.METRICS
        if run.has(metric)
    ]


def _change(series: Series | None) -> str:
    """First and last value."""
    if series is None:
        return "–"
    return f"{number(series.values[0])} → {number(series.values[-1])}"


def _last(metric: Metric) -> Callable[[Run], str]:
    """Formats the last value of evaluation; without one that of training, and a t."""

    def show(run: Run) -> str:
        evaluated, trained = run.series(EVAL + metric.name), run.series(metric.name)
        if evaluated:
            return number(evaluated.values[-1])
        return number(trained.values[-1]) + " t" if trained else "–"

    return show


RUN_COLUMNS: list[tuple[str, Callable[[Run], str]]] = [
    ("control", lambda run: run.control or "–"),
    ("ε", lambda run: number(run.controller.get("epsilon"))),
    ("β", _beta_change),
    ("KL, nats", _last(logged.KL)),
    ("accuracy", _last(logged.ACCURACY)),
    ("margin", _last(logged.MARGIN)),
    ("loss", _last(logged.LOSS)),
    ("state", runs.status),
]


def row_of_run(run: Run) -> list[str]:
    """The cells of a run, one for each of RUN_COLUMNS."""
    return [show(run) for _, show in RUN_COLUMNS]


# --- scores ------------------------------------------------------------------------

SCORE_COLUMNS: dict[str, Callable[[Any], str]] = {
    "pairs": str,
    "accuracy": number,
    "margin": number,
    "chosen_reward": number,
    "rejected_reward": number,
    "kl": number,
    "loss": number,
}


def scored_with(scored: Scored) -> str:
    """A sentence: which model was scored, and the β of its rewards."""
    beta = number(scored.summary["beta"])
    return f"The model of {scored.summary['model']}, with β = {beta}."


def rows_of_scores(scored: Scored) -> list[tuple[str, list[str]]]:
    """A row for all pairs, then one for each set: its name, and its scores."""
    return [
        (one["name"] or "all", [show(one[key]) for key, show in SCORE_COLUMNS.items()])
        for one in scored.summary["sets"]
    ]


# --- pairs -------------------------------------------------------------------------

PAIR_COLUMNS: list[tuple[str, Callable[[Any], str]]] = [
    ("seen", lambda pair: str(pair.seen)),
    ("smaller β", lambda pair: percent(pair.smaller)),
    ("larger β", lambda pair: percent(pair.larger)),
    ("log-ratio", lambda pair: number(pair.log_ratio)),
    ("last margin", lambda pair: number(pair.margin)),
    ("last KL", lambda pair: number(pair.kl)),
    ("tokens", lambda pair: " + ".join(_tokens(pair))),
]
DOUBTFUL = (
    "Lowest mean log-ratio first: what the policy learned from the other pairs speaks "
    "against these labels. Look for flipped ones here, above all where a pair keeps "
    "asking for a larger β (s = −1). Tokens are of prompt + chosen + rejected."
)
SUREST = "Highest mean log-ratio first."


def _tokens(pair: Any) -> list[str]:
    return [str(getattr(pair, name)) for name in trace.TOKENS]


def doubtful(pairs: Pairs) -> list[Any]:
    """The pairs with the lowest mean log-ratio, lowest first: labels may be wrong."""
    return list(pairs.table.head(SHOWN).itertuples())


def surest(pairs: Pairs) -> list[Any]:
    """The pairs with the highest mean log-ratio, highest first; not those above."""
    rest = pairs.table.iloc[SHOWN:]
    return list(rest.tail(SHOWN).iloc[::-1].itertuples())


def folded(text: str | None) -> tuple[str, str]:
    """Splits a long text between words, into a start and a rest to fold.

    A short text has an empty rest. For None the start is a dash.
    """
    if text is None:
        return "–", ""
    if len(text) <= FOLD:
        return text, ""
    space = text.rfind(" ", FOLD // 2, FOLD)
    cut = space if space > 0 else FOLD
    return text[:cut], text[cut:]


def summary(pairs: Pairs) -> str:
    """Sentences: how many pairs were traced, and how many always had the same s."""
    table = pairs.table
    repeated = table["seen"] > 1
    always = [(repeated & (table[ask] == 1)).sum() for ask in ("smaller", "larger")]
    if not trace.has_steps(pairs.observations):
        asked = "Under this control pairs ask for no β; they are ranked by log-ratio."
    elif repeated.any():
        asked = (
            f"Of the {repeated.sum()} seen more than once, {always[0]} asked for a "
            f"smaller β each time and {always[1]} for a larger one."
        )
    else:
        asked = (
            "Each was seen once. One step is a sign only, so pairs are ranked by "
            "log-ratio, which says by how much as well."
        )
    return f"{len(pairs.observations)} observations of {len(table)} pairs. {asked}"
