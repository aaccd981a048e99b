"""SWEEP.md and its figures, from sweep.json and what was written by hand.

    python examples/study/sweep_page.py

What the numbers mean is in sweep_comments.md, once somebody has looked at them.
"""

import os
import statistics
from collections.abc import Sequence
from typing import Any

import summary
import sweep_figures
from grid import BASELINE, HERE, REFERENCE, SIGNS
from page import signed, table
from regret import METHOD, Tests, tests
from summary import Result, estimate, methods, paired, select
from sweep import FLIPPED, LABELS, LOSSES, METHODS, SWEEP

GRID = "sweep"
CAPTIONS = {
    "reward": "True reward against initial β",
    "frontier": "True reward against true KL",
    "beta": "β over the run",
}


def main() -> None:
    """Draws the figures and writes SWEEP.md."""
    whole = summary.load(GRID)
    places = summary.Places.of(GRID)
    pictures = sweep_figures.draw(whole["cells"], places.pictures)
    places.tables.write_text(text_of(whole, places))
    print(f"wrote {places.tables} and {len(pictures)} figures to {places.pictures}")


def text_of(whole: dict[str, Any], places: summary.Places) -> str:
    """The text of SWEEP.md."""
    cells = whole["cells"]
    folder = os.path.relpath(places.pictures, places.tables.parent)
    found = {label: tests(cells, label) for label in LABELS}
    sections = {
        "reward": [*by_beta(cells, found), "", *verdicts(found)],
        "frontier": at_equal_kl(found),
        "beta": last_betas(cells),
    }
    comments = HERE / "sweep_comments.md"
    parts = [
        head(whole),
        *([comments.read_text().strip()] if comments.exists() else []),
    ]
    for name, lines in sections.items():
        image = f"![{CAPTIONS[name]}]({folder}/sweep_{name}.png)"
        parts += [f"## {CAPTIONS[name]}", image, "\n".join(lines)]
    parts += ["## Other methods", "\n".join(others(cells))]
    parts += ["## The losses of Table 1", "\n".join(losses(cells))]
    parts += ["## Trials of the learning rate", "\n".join(trials(cells))]
    return "\n\n".join(parts) + "\n"


def head(whole: dict[str, Any]) -> str:
    """What was run, where, and how long it took."""
    cells = whole["cells"]
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    seconds = statistics.median(sum(cell["seconds"].values()) for cell in cells)
    starts = [
        f"{estimate(of_label, 'reward').text()} ({name})"
        for label, name in LABELS.items()
        for of_label in [select(cells, method=REFERENCE, flipped_labels=label)]
    ]
    hours = f"{whole['minutes'] / 60:.1f}"
    pairs, steps = SWEEP.world.train_pairs, SWEEP.steps
    return f"""# Does ε-DPO spare the sweep over β?

    python examples/study/run.py --grid {GRID}

{whole["date"]}, {whole["device"]}, {versions}, commit {whole["commit"]}:
{len(cells)} cells, {hours} hours in all; a worker took {seconds:.0f} s for the median
cell. [PLAN.md](PLAN.md) has the question, the runs and the tests. It was written before
the runs.

{pairs} pairs, each trained on once: {steps} steps of {SWEEP.step_pairs} pairs at
learning rate {SWEEP.learning_rate:g}. {SWEEP.seeds} seeds of DPO and ε-DPO,
{SWEEP.fewer_seeds} of every other method. ± is a 95 % interval over seeds (Student's t)
unless 99 % is said. Where an interval holds 0, the difference is called none. The
initial model has reward {" and ".join(starts)}."""


def by_beta(cells: Sequence[Result], found: dict[float, Tests]) -> list[str]:
    """Rewards and regrets of the two methods that decide, at each initial β."""
    rows = []
    for label, name in LABELS.items():
        runs = methods(select(cells, flipped_labels=label), "sweep")
        rows += [
            [
                name,
                f"{beta:g}",
                *(estimate(runs[m][beta], "reward").text() for m in (BASELINE, METHOD)),
                signed(at.difference),
                *(estimate(runs[m][beta], "kl").text() for m in (BASELINE, METHOD)),
                signed(at.baseline),
                signed(at.method),
            ]
            for beta, at in found[label].at.items()
        ]
    header = [
        "labels",
        "initial β",
        "reward, DPO",
        "reward, ε-DPO",
        "ε-DPO − DPO (99 %)",
        "KL, DPO",
        "KL, ε-DPO",
        "regret, DPO",
        "regret, ε-DPO",
    ]
    return table(header, rows)


def verdicts(found: dict[float, Tests]) -> list[str]:
    """The tests of the plan."""
    rows = [
        [
            name,
            signed(found[label].primary),
            "yes" if found[label].spares_the_sweep else "no",
            signed(found[label].cost),
            "yes" if found[label].is_free else "no",
            ", ".join(f"{b:g} ({n})" for b, n in found[label].tuned.items()),
        ]
        for label, name in LABELS.items()
    ]
    header = [
        "labels",
        "1. mean regret, DPO's − ε-DPO's",
        "2. spares the sweep",
        "3. ε-DPO − DPO at DPO's tuned β",
        "no cost there",
        "tuned β (seeds)",
    ]
    return table(header, rows)


def at_equal_kl(found: dict[float, Tests]) -> list[str]:
    """Test 5: ε-DPO above DPO's curve."""
    rows = [
        [name, f"{beta:g}", signed(at.at_kl) if at.at_kl else "outside of DPO's"]
        for label, name in LABELS.items()
        for beta, at in found[label].at.items()
    ]
    note = (
        "Reward of ε-DPO above DPO's at the same KL (linear in log KL, seed by seed)."
    )
    return [note, "", *table(["labels", "initial β", "above DPO's curve"], rows)]


def last_betas(cells: Sequence[Result]) -> list[str]:
    """β of ε-DPO after the last step, as a share of the initial one."""
    rows = []
    for label, name in LABELS.items():
        runs = methods(select(cells, flipped_labels=label), "sweep")[METHOD]
        last = [estimate(runs[beta], "last_beta").mean / beta for beta in runs]
        rows.append([name, *(f"{share:.3g}" for share in last)])
    header = ["last β / initial β", *(f"initial β {beta:g}" for beta in SWEEP.betas)]
    return table(header, rows)


def others(cells: Sequence[Result]) -> list[str]:
    """β-DPO and TR-DPO beside DPO of the same seeds."""
    rows = []
    for label, name in LABELS.items():
        runs = methods(select(cells, flipped_labels=label), "sweep")
        for method in METHODS:
            if method in (BASELINE, METHOD):
                continue
            rows += [
                [
                    name,
                    method,
                    f"{beta:g}",
                    estimate(of_beta, "reward").text(),
                    estimate(of_beta, "kl").text(),
                    signed(paired(of_beta, runs[BASELINE][beta], "reward")),
                ]
                for beta, of_beta in runs[method].items()
            ]
    header = ["labels", "method", "initial β", "true reward", "KL", "− DPO's"]
    return table(header, rows)


def losses(cells: Sequence[Result]) -> list[str]:
    """Every method at the best of its settings, seeds that all of them have."""
    few = [cell for cell in cells if cell["seed"] < SWEEP.fewer_seeds]
    noisy = select(few, flipped_labels=FLIPPED)
    settings = {
        **{m: list(methods(noisy, "sweep")[m].values()) for m in METHODS},
        **{m: _settings(select(noisy, group="table1", method=m)) for m in LOSSES},
    }
    best = {m: max(runs, key=_mean_reward) for m, runs in settings.items()}
    rows = [
        [
            method,
            str(len(settings[method])),
            _keys(runs[0]),
            estimate(runs, "reward").text(),
            estimate(runs, "kl").text(),
            ""
            if method == BASELINE
            else signed(paired(runs, best[BASELINE], "reward")),
        ]
        for method, runs in sorted(best.items(), key=lambda x: -_mean_reward(x[1]))
    ]
    note = (
        f"{FLIPPED:.0%} flipped labels, {SWEEP.fewer_seeds} seeds. Each method at the "
        "best of its settings, chosen on the answers that are shown."
    )
    header = ["method", "settings", "best", "true reward", "KL", "− DPO's best"]
    return [note, "", *table(header, rows)]


def trials(cells: Sequence[Result]) -> list[str]:
    """Mean reward of DPO at each learning rate and β, on worlds that are not graded."""
    runs = select(cells, group="trial")
    rows = [
        [
            f"{rate:g}",
            *(
                f"{_mean_reward(select(runs, learning_rate=rate, beta=beta)):.2f}"
                for beta in SWEEP.trial_betas
            ),
        ]
        for rate in SWEEP.trial_rates
    ]
    header = ["learning rate", *(f"β {beta:g}" for beta in SWEEP.trial_betas)]
    return ["Mean true reward of two worlds.", "", *table(header, rows)]


def best_rate(cells: Sequence[Result]) -> float:
    """The learning rate that the plan's rule chooses."""
    runs = select(cells, group="trial")

    def at_its_best(rate: float) -> float:
        of_rate = select(runs, learning_rate=rate)
        return max(_mean_reward(select(of_rate, beta=b)) for b in SWEEP.trial_betas)

    return max(SWEEP.trial_rates, key=at_its_best)


def _settings(runs: Sequence[Result]) -> list[list[Result]]:
    """Runs by setting."""
    found: dict[str, list[Result]] = {}
    for run in runs:
        found.setdefault(_keys(run), []).append(run)
    return list(found.values())


def _keys(run: Result) -> str:
    """The keys of a run in which those of its method differ."""
    keys = run["keys"]
    shown = [key for key in ("beta", "rl_beta", *SIGNS) if key in keys]
    return ", ".join(f"`{key}: {keys[key]:g}`" for key in shown)


def _mean_reward(runs: Sequence[Result]) -> float:
    return statistics.mean(run["reward"] for run in runs)


if __name__ == "__main__":
    main()
