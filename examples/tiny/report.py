"""Before and after: what ε-DPO did to the tiny model, in numbers and answers.

    python examples/tiny/report.py

Reads what build.py and `axolotl train examples/tiny_edpo.yml` left behind. Prints

    held-out accuracy   share of eval pairs whose implicit reward margin is above 0;
                        the margin is that of the DPO loss, ties count half, so a
                        model equal to its reference has 50 %
    true reward         of sampled answers, by the world's own rule (see world.py)
    KL                  of policy from reference per token of those answers, summed
                        exactly over the vocabulary

The run step by step is what `axolotl edpo-report examples/tiny/out` draws.
"""

import json
import statistics
import sys
from pathlib import Path

import lm
import torch
from world import best_reward, true_reward

from axolotl_edpo.report.runs import read_run

HERE = Path(__file__).parent
BUILD = HERE / "build"
OUT = HERE / "out"

ANSWERS_PER_PROMPT = 4
SHOWN = 3


def main() -> None:
    """Measure both models, print."""
    pairs = read_pairs()
    betas = read_betas()
    torch.set_num_threads(1)
    reference, tokenizer = lm.load(BUILD / "model")
    policy, _ = lm.load(OUT)
    before = measure(reference, reference, tokenizer, pairs)
    after = measure(policy, reference, tokenizer, pairs)
    print_table(before, after, betas)
    print_answers(pairs, before["answers"], after["answers"])


def read_betas() -> list[float]:
    """β of each step that was logged."""
    model = OUT / "model.safetensors"
    if not model.exists():
        sys.exit("no trained model: run `axolotl train examples/tiny_edpo.yml`")
    if model.stat().st_mtime < (BUILD / "manifest.json").stat().st_mtime:
        sys.exit("build/ is newer: run `axolotl train examples/tiny_edpo.yml` again")
    return read_run(OUT).series("kl/beta").values


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


if __name__ == "__main__":
    main()
