"""RESULTS.md and the figures, from results.json and what was written by hand.

    python examples/study/page.py [--grid large]

What the numbers mean is in comments.md, written after looking at them; everything else
in RESULTS.md is computed here.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

import figures
import summary
from grid import BASELINE, BETA, EPSILON, GRIDS, HERE, REFERENCE
from summary import Estimate, above_curve, estimate, paired

SCORES = {"step": "mean s", "plus": "mean Δ+", "margin": "mean margin"}
CAPTIONS = {
    "frontier": "True reward against true KL",
    "epsilon": "β and KL over training",
    "classes": "Implicit reward margin by the pair's step",
    "flips": "Scores of flipped and clean pairs",
    "means": "Arithmetic and harmonic mean",
    "decisions": "Steps of bf16 models",
}


def main() -> None:
    """Writes what results.json holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=GRIDS, default="small")
    write(parser.parse_args().grid)


def write(grid: str) -> None:
    """Draws the figures of a grid and writes its RESULTS.md."""
    whole = summary.load(grid)
    places = summary.Places.of(grid)
    pictures = figures.draw(whole["cells"], places.pictures)
    places.tables.write_text(text_of(whole, places))
    print(f"wrote {places.tables} and {len(pictures)} figures to {places.pictures}")


def text_of(whole: dict[str, Any], places: summary.Places) -> str:
    """The text of RESULTS.md."""
    cells = whole["cells"]
    comments = HERE / "comments.md"
    own = comments.read_text().strip() if whole["grid"] == "small" else ""
    sections = {
        "frontier": frontier(cells),
        "epsilon": epsilons(cells),
        "classes": classes(cells),
        "flips": flips(cells),
        "means": means(cells),
        "decisions": decisions(cells),
    }
    parts = [head(whole), own]
    for name, lines in sections.items():
        picture = os.path.relpath(places.pictures, places.tables.parent)
        image = f"![{CAPTIONS[name]}]({picture}/study_{name}.png)"
        parts += [f"## {CAPTIONS[name]}", image, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(whole: dict[str, Any]) -> str:
    """What was run, where, and how long it took."""
    cells, grid = whole["cells"], GRIDS[whole["grid"]]
    seeds = len({cell["seed"] for cell in cells})
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    start = estimate(summary.select(cells, method=REFERENCE), "reward")
    answers = cells[0]["answers"]
    seconds = statistics.median(sum(cell["seconds"].values()) for cell in cells)
    return f"""# Results of the study, {whole["grid"]} grid

    python examples/study/run.py --grid {whole["grid"]}

{whole["date"]}, {whole["device"]}, {versions}, commit {whole["commit"]}:
{len(cells)} cells, {seeds} seeds, {whole["minutes"]:.0f} minutes in all; a worker took
{seconds:.0f} s for the median cell.

{grid.world.train_pairs} pairs, {grid.world.flipped:.0%} of them flipped, {grid.epochs}
epochs, {grid.steps} steps of {grid.step_pairs} pairs. ± is a 95 % interval over {seeds}
seeds (Student's t), each with a language model, pairs, order and sampling of its own.
Reward and KL are of {answers} answers per seed to held-out prompts; the reference has
reward {start.text()} and an accuracy of 50 %. A difference is taken seed by seed; where
its interval holds 0 it is called none. "At this KL" is against DPO's curve of the same
seed, linear in log KL between its runs."""


def frontier(cells: Sequence[summary.Result]) -> list[str]:
    """Each method at each β."""
    runs = summary.methods(cells)
    rows = [
        [
            method,
            f"{beta:g}",
            estimate(of_beta, "reward").text(),
            estimate(of_beta, "kl").text(),
            estimate(of_beta, "kl_per_token").text(3),
            _percent(estimate(of_beta, "accuracy")),
            f"{estimate(of_beta, 'last_beta').mean:.3g}",
            *_against(of_beta, runs[BASELINE], beta, method == BASELINE),
        ]
        for method, of_method in runs.items()
        for beta, of_beta in of_method.items()
    ]
    header = [
        "method",
        "β",
        "true reward",
        "KL per answer",
        "KL per token",
        "held-out accuracy",
        "last β",
        "reward − DPO's at this β",
        "at this KL",
    ]
    return [*table(header, rows), "", *_best(runs)]


def _against(of_beta, baseline, beta: float, is_baseline: bool) -> list[str]:
    """Reward less DPO's at the same β, and at the same KL."""
    if is_baseline:
        return ["", ""]
    at_kl = above_curve(of_beta, baseline)
    beside = signed(at_kl) if at_kl else "outside of DPO's"
    return [_difference(of_beta, baseline[beta]), beside]


def _best(runs: dict[str, dict[float, list]]) -> list[str]:
    """Each method at the β where its mean reward is highest."""

    def best(method: str) -> float:
        return max(runs[method], key=lambda b: estimate(runs[method][b], "reward").mean)

    base = runs[BASELINE][best(BASELINE)]
    rows = []
    for method in runs:
        own = runs[method][best(method)]
        rows.append(
            [
                method,
                f"{best(method):g}",
                estimate(own, "reward").text(),
                estimate(own, "kl").text(),
                "" if method == BASELINE else _difference(own, base),
            ]
        )
    header = ["method", "best β", "true reward", "KL per answer", "reward − DPO's best"]
    note = "At the β with the highest mean reward, chosen on the same answers:"
    return [note, "", *table(header, rows)]


def epsilons(cells: Sequence[summary.Result]) -> list[str]:
    """ε-DPO at one β for each ε."""
    base = summary.methods(cells)[BASELINE][BETA]
    rows = [["0 (DPO)", *_outcome(base), ""]]
    rows += [
        [f"{value:g}", *_outcome(runs), _difference(runs, base)]
        for value, runs in summary.epsilon_runs(cells).items()
    ]
    header = ["ε", "last β", "true reward", "KL per answer", "reward − DPO's"]
    return [f"β {BETA}, arithmetic mean.", "", *table(header, rows)]


def means(cells: Sequence[summary.Result]) -> list[str]:
    """The same settings with either mean."""
    arithmetic = summary.epsilon_runs(cells)
    rows = [
        [
            f"{value:g}",
            *(f"{estimate(of, 'last_beta').mean:.3g}" for of in (own, runs)),
            *(estimate(of, "reward").text() for of in (own, runs)),
            _difference(runs, own),
        ]
        for value, runs in summary.harmonic_runs(cells).items()
        for own in [arithmetic[value]]
    ]
    header = [
        "ε",
        "last β, arithmetic",
        "harmonic",
        "true reward, arithmetic",
        "harmonic",
        "harmonic − arithmetic",
    ]
    return [f"β {BETA}.", "", *table(header, rows)]


def classes(cells: Sequence[summary.Result]) -> list[str]:
    """How many visits each s has, and how many of them are of flipped pairs."""
    found = [cell["classes"] for cell in _of_default(cells)]
    rows = [
        [label]
        + [
            _percent(Estimate.of([one[name][what] or 0.0 for one in found]))
            for what in ("share", "flipped")
        ]
        for name, label in (("1", "+1"), ("0", "0"), ("-1", "−1"))
    ]
    header = ["s", "share of visits", "of these flipped"]
    return [f"β {BETA}, ε {EPSILON}.", "", *table(header, rows)]


def flips(cells: Sequence[summary.Result]) -> list[str]:
    """Areas under the ROC curve of each score, and the pairs that never let go."""
    traced = {"DPO": summary.methods(cells)[BASELINE][BETA]}
    traced |= {
        f"ε-DPO, ε {value:g}": runs
        for value, runs in summary.epsilon_runs(cells).items()
    }
    rows = [
        [name, *(_area(runs, score) for score in SCORES), *_always_down(runs)]
        for name, runs in traced.items()
    ]
    header = [
        "run",
        *SCORES.values(),
        "pairs with s = −1 at every visit",
        "of these flipped",
        "of all flipped",
    ]
    note = (
        f"β {BETA}. Area under the ROC curve: the probability that a clean pair scores "
        "higher than a flipped one, 0.50 by chance."
    )
    return [note, "", *table(header, rows)]


def decisions(cells: Sequence[summary.Result]) -> list[str]:
    """Agreement at each stage, mean of the seeds."""
    runs = [cell["decisions"] for cell in _of_default(cells)]
    names = ("ours", "released, float32", "released, bfloat16", "moves")
    rows = [
        [str(stages[0]["step"])]
        + [_percent(Estimate.of([stage[name] for stage in stages])) for name in names]
        for stages in zip(*runs, strict=True)
    ]
    header = ["optimizer step", *names[:3], "exact s is not 0"]
    note = f"β {BETA}, ε {EPSILON}. Share of pairs whose s equals the float64 oracle's."
    return [note, "", *table(header, rows)]


def _outcome(runs: list[summary.Result]) -> list[str]:
    last = f"{estimate(runs, 'last_beta').mean:.3g}"
    return [last, *(estimate(runs, name).text() for name in ("reward", "kl"))]


def _difference(runs: list[summary.Result], others: list[summary.Result]) -> str:
    return signed(paired(runs, others, "reward"))


def signed(found: Estimate) -> str:
    """`+0.05 ± 0.02`; with ", none" where the interval holds 0."""
    none = "" if found.is_difference else ", none"
    return f"{found.mean:+z.2f} ± {found.half:.2f}{none}"


def _area(runs: list[summary.Result], score: str) -> str:
    areas = [run["flips"][score]["auc"] for run in runs if score in run["flips"]]
    return Estimate.of(areas).text() if areas else ""


def _always_down(runs: list[summary.Result]) -> list[str]:
    found = [run["flips"].get("always_down") for run in runs]
    if None in found:
        return ["", "", ""]
    counted = f"{sum(one['pairs'] for one in found) / len(found):.0f}"
    shares = ("flipped", "of_flipped")
    return [
        counted,
        *(_percent(Estimate.of([one[k] or 0.0 for one in found])) for k in shares),
    ]


def _of_default(cells: Sequence[summary.Result]) -> list[summary.Result]:
    return summary.methods(cells)["ε-DPO"][BETA]


def _percent(share: Estimate) -> str:
    return f"{100 * share.mean:.1f} ± {100 * share.half:.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
