"""Before and after: what ε-DPO did to the tiny model, in numbers and one figure.

    python examples/tiny/report.py

Reads what build.py and `axolotl train examples/tiny_edpo.yml` left behind. Prints

    held-out accuracy   share of eval pairs whose implicit reward margin is above 0;
                        the margin is that of the DPO loss, ties count half, so a
                        model equal to its reference has 50 %
    true reward         of sampled answers, by the world's own rule (see world.py)
    KL                  of policy from reference per token of those answers, summed
                        exactly over the vocabulary

and writes examples/tiny/out/edpo.png, the run step by step.
"""

import json
import statistics
import sys
from pathlib import Path

import lm
import torch
from world import best_reward, true_reward

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("no matplotlib: run `pip install axolotl-edpo[demo]`")

HERE = Path(__file__).parent
BUILD = HERE / "build"
OUT = HERE / "out"
FIGURE = OUT / "edpo.png"

ANSWERS_PER_PROMPT = 4
SHOWN = 3
WINDOW = 9  # steps
# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE = "#0072B2", "#D55E00"


def main() -> None:
    """Measure both models, print, draw."""
    pairs = read_pairs()
    history = read_history()
    torch.set_num_threads(1)
    reference, tokenizer = lm.load(BUILD / "model")
    policy, _ = lm.load(OUT)
    before = measure(reference, reference, tokenizer, pairs)
    after = measure(policy, reference, tokenizer, pairs)
    betas = [entry["kl/beta"] for entry in history if "kl/beta" in entry]
    print_table(before, after, betas)
    print_answers(pairs, before["answers"], after["answers"])
    draw(history)
    print(f"The run step by step: {FIGURE}")


def read_history() -> list[dict]:
    """What the trainer logged, from the newest checkpoint."""
    states = OUT.glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or not (OUT / "model.safetensors").exists():
        sys.exit("no trained model: run `axolotl train examples/tiny_edpo.yml`")
    if newest.stat().st_mtime < (BUILD / "manifest.json").stat().st_mtime:
        sys.exit("build/ is newer: run `axolotl train examples/tiny_edpo.yml` again")
    return json.loads(newest.read_text())["log_history"]


def read_pairs() -> list[dict[str, str]]:
    """The held-out pairs."""
    if not (BUILD / "eval.jsonl").exists():
        sys.exit("no held-out pairs: run `python examples/tiny/build.py`")
    lines = (BUILD / "eval.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def measure(policy, reference, tokenizer, pairs) -> dict:
    """Accuracy on held-out pairs; true reward and KL of answers to their prompts."""
    prompts = [pair["prompt"] for pair in pairs]
    margins = torch.zeros(len(pairs))
    for side, sign in (("chosen", 1), ("rejected", -1)):
        answers = [pair[side] for pair in pairs]
        log_ratios, _ = lm.compare(policy, reference, tokenizer, prompts, answers)
        margins += sign * log_ratios
    torch.manual_seed(0)
    asked = prompts * ANSWERS_PER_PROMPT
    answers = lm.sample_answers(policy, tokenizer, asked)
    _, kl = lm.compare(policy, reference, tokenizer, asked, answers)
    rewards = [true_reward(*both) for both in zip(asked, answers, strict=True)]
    return {
        "accuracy": ((margins > 0).float() + 0.5 * (margins == 0)).mean().item(),
        "reward": statistics.mean(rewards),
        "error": statistics.stdev(rewards) / len(rewards) ** 0.5,
        "best": statistics.mean(best_reward(prompt) for prompt in asked),
        "kl": kl.mean().item(),
        "answers": answers,
    }


def print_table(before: dict, after: dict, betas: list[float]) -> None:
    """One row per measure, before and after."""

    def reward(measures):
        return f"{measures['reward']:.2f} ± {measures['error']:.2f}"

    rows = [
        ("", "before", "after"),
        ("held-out accuracy", f"{before['accuracy']:.1%}", f"{after['accuracy']:.1%}"),
        ("true reward of answers", reward(before), reward(after)),
        ("KL per token of answers", f"{before['kl']:.3f}", f"{after['kl']:.3f}"),
        ("β (first, last step)", f"{betas[0]:.4f}", f"{betas[-1]:.4f}"),
    ]
    print()
    for name, *values in rows:
        print(f"{name:<26}" + "".join(f"{value:>16}" for value in values))
    print(
        f"\n±: one standard error of the mean of {len(before['answers'])} answers. "
        f"Perfect ones would average {before['best']:.2f}."
    )


def print_answers(pairs: list[dict], before: list[str], after: list[str]) -> None:
    """Some requests with an answer of each model, and what it is worth."""
    for pair, old, new in list(zip(pairs, before, after, strict=False))[:SHOWN]:
        print(f"\n{pair['prompt']}")
        for when, answer in (("before", old), ("after", new)):
            worth = true_reward(pair["prompt"], answer)
            print(f"  {when:<7}{worth:>5.1f}  {answer}")
    print()


def draw(history: list[dict]) -> None:
    """Four panels over the optimizer steps."""
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    (beta, shares), (kl, margins) = axes

    beta.plot(*series(history, "kl/beta"), color=BLUE, linewidth=2)
    beta.set_title("KL penalty β")

    shares.plot(
        *smoothed(history, "kl/p_epsilon_steps"),
        color=ORANGE,
        label="s = +1:  β̃ = β/(1+ε), a smaller penalty",
    )
    shares.plot(
        *smoothed(history, "kl/n_epsilon_steps"),
        color=BLUE,
        linestyle="--",
        label="s = −1:  β̃ = β/(1−ε), a larger penalty",
    )
    shares.set_ylim(0, 1)
    shares.set_ylabel("share of pairs")
    shares.set_title(f"Pairs that ask for another β, mean of {WINDOW} steps")

    draw_train_and_eval(kl, history, "kl/policy_ref")
    kl.set_title("KL(policy ‖ reference) per completion token")
    draw_train_and_eval(margins, history, "rewards/margins")
    margins.set_title("Implicit reward margin, at the β̃ of each pair")

    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (shares, kl, margins):
        panel.legend(frameon=False, fontsize=9, loc="upper left")
    for panel in axes[1]:
        panel.set_xlabel("optimizer step")
    figure.suptitle("ε-DPO on the tiny world")
    figure.savefig(FIGURE)


def draw_train_and_eval(panel, history: list[dict], name: str) -> None:
    """A metric of the training pairs as a line, of the held-out pairs as dots."""
    panel.plot(*series(history, name), color=BLUE, alpha=0.25, linewidth=1)
    panel.plot(
        *smoothed(history, name), color=BLUE, label=f"train, mean of {WINDOW} steps"
    )
    panel.plot(
        *series(history, f"eval_{name}"),
        color=ORANGE,
        linestyle="--",
        marker="o",
        label="held out",
    )


def series(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    found = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The same, each value the mean of up to WINDOW steps around it."""
    steps, values = series(history, name)
    half = WINDOW // 2
    return steps, [
        statistics.mean(values[max(0, i - half) : i + half + 1])
        for i in range(len(values))
    ]


if __name__ == "__main__":
    main()
