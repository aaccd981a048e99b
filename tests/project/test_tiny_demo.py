"""examples/tiny: the true reward by hand, and pairs that are what they say."""

import importlib
import random
import sys

import pytest
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "examples" / "tiny"))
build = importlib.import_module("build")
world = importlib.import_module("world")

FOX = "Tell me the color and food of the fox."


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("With pleasure! The fox is red and eats mice.", 2.5),
        ("The fox eats mice. It sleeps by day.", 0.5),  # one asked, one not
        ("The fox is red. It is red.", 0.5),  # told twice
        ("Whatever. The fox is pink.", -1.5),  # curt and false
        ("The owl eats mice.", world.MALFORMED),
        ("The fox", world.MALFORMED),
        ("", world.MALFORMED),
    ],
)
def test_the_true_reward_counts(answer, reward):
    assert world.true_reward(FOX, answer) == reward


def test_no_answer_beats_the_best():
    rng = random.Random(0)
    for prompt in world.all_prompts()[::40]:
        answers = [world.write_answer(prompt, rng) for _ in range(20)]
        rewards = [world.true_reward(prompt, answer) for answer in answers]
        assert world.MALFORMED < max(rewards) <= world.best_reward(prompt)


def test_pairs_follow_the_true_reward_and_flips_are_counted():
    def pairs(seed):
        rng = random.Random(seed)
        prompts = world.all_prompts()[:600]
        answers = lambda batch: [world.write_answer(p, rng) for p in batch]  # noqa: E731
        made = build.make_pairs(answers, prompts, 200)
        gains = [margin(pair) for pair in made]
        build.flip(made, 0.1, rng)
        return made, gains

    def margin(pair):
        chosen, rejected = (
            world.true_reward(pair["prompt"], pair[k]) for k in ("chosen", "rejected")
        )
        return chosen - rejected

    made, gains = pairs(3)
    assert min(gains) > 0
    assert sum(margin(pair) < 0 for pair in made) == 20
    assert pairs(3)[0] == made != pairs(4)[0]


def test_too_few_pairs_are_an_error_and_not_a_smaller_build():
    with pytest.raises(ValueError, match="1 prompts gave 0 pairs of 5"):
        build.make_pairs(lambda batch: ["" for _ in batch], [FOX], 5)
