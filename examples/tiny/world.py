"""A little world in which everyone can see which answer is better.

Someone asks for one to three facts about an animal:

    Tell me the color and food of the fox.

and gets an answer in a sentence or two, good, bad or in between:

    With pleasure! The fox is red and eats mice.          2.5: all that was asked
    The fox eats mice. It sleeps by day.                  0.5: one asked, one not
    Whatever. The fox is pink.                           -1.5: curt and false

`true_reward` reads the answer and counts. In real preference data it is hidden
behind people's labels; here it is a function, so a trained model can be graded by
what it was meant to learn and not only by the loss it was trained on.

Every random choice takes a `random.Random`: one seed, one world.
"""

import itertools
import random
import re

# The order of the facts below, and the verb phrase that states each of them.
ASPECTS = {
    "color": "is {}",
    "food": "eats {}",
    "home": "lives {}",
    "sound": "{}",
    "sleep": "sleeps {}",
}

ANIMALS = {
    "bat": ("black", "flies", "in the cave", "squeaks", "by day"),
    "bear": ("brown", "berries", "in the mountains", "growls", "at night"),
    "cat": ("black", "fish", "in the town", "meows", "by day"),
    "cow": ("white", "grass", "on the farm", "moos", "at night"),
    "dog": ("brown", "meat", "on the farm", "barks", "at night"),
    "duck": ("brown", "seeds", "by the pond", "quacks", "at night"),
    "elephant": ("gray", "leaves", "on the plains", "trumpets", "at night"),
    "fox": ("red", "mice", "in the forest", "barks", "by day"),
    "frog": ("green", "flies", "by the pond", "croaks", "by day"),
    "horse": ("brown", "grass", "on the farm", "neighs", "at night"),
    "lion": ("golden", "meat", "on the plains", "roars", "by day"),
    "monkey": ("brown", "fruit", "in the jungle", "chatters", "at night"),
    "owl": ("brown", "mice", "in the forest", "hoots", "by day"),
    "pig": ("pink", "roots", "on the farm", "grunts", "at night"),
    "sheep": ("white", "grass", "on the farm", "bleats", "at night"),
    "snake": ("green", "mice", "in the field", "hisses", "at night"),
}

REQUESTS = (
    "Tell me the {aspects} of the {animal}.",
    "Describe the {animal}: {aspects}.",
    "What is the {animal} like: {aspects}?",
)

# How an answer may begin, and what that is worth.
MANNERS = {"With pleasure! ": 0.5, "": 0.0, "Whatever. ": -0.5}

# phrase -> (aspect, value), for every phrase that a fluent answer can contain.
PHRASES = {
    phrase.format(value): (aspect, value)
    for values in ANIMALS.values()
    for (aspect, phrase), value in zip(ASPECTS.items(), values, strict=True)
}

MALFORMED = -3.0


def all_prompts() -> list[str]:
    """Every request of this world, in a fixed order: 16 x 85 x 3 = 4080."""
    return [
        request.format(animal=animal, aspects=_listed(aspects))
        for animal in ANIMALS
        for count in (1, 2, 3)
        for aspects in itertools.permutations(ASPECTS, count)
        for request in REQUESTS
    ]


def write_answer(prompt: str, rng: random.Random) -> str:
    """A fluent answer of random quality: what the language model grows up on."""
    animal, asked = _read_prompt(prompt)
    facts = _facts(animal)
    told = [aspect for aspect in asked if rng.random() < 0.75]
    told += [a for a in ASPECTS if a not in asked and rng.random() < 0.15]
    phrases = []
    for aspect in told or [asked[0]]:
        value = facts[aspect]
        if rng.random() < 0.25:
            value = rng.choice([v for a, v in PHRASES.values() if a == aspect])
        phrases.append(ASPECTS[aspect].format(value))
    first = rng.choice([len(phrases), len(phrases), (len(phrases) + 1) // 2])
    sentences = [f"The {animal} {_listed(phrases[:first])}."]
    if phrases[first:]:
        sentences.append(f"It {_listed(phrases[first:])}.")
    return rng.choice(list(MANNERS)) + " ".join(sentences)


def true_reward(prompt: str, answer: str) -> float:
    """How good an answer is, by counting.

    Args:
        prompt: One of `all_prompts`.
        answer: Any text.

    Returns:
        +1 for each fact asked for and given, -1 for each false one, -0.5 for each
        one that nobody asked for or that was told before, and +0.5 or -0.5 for
        manners. Text that is not an answer about the animal gets `MALFORMED`.
    """
    animal, asked = _read_prompt(prompt)
    parsed = _read_answer(animal, answer)
    if parsed is None:
        return MALFORMED
    reward, told = parsed
    facts = _facts(animal)
    wanted = set(asked)
    for aspect, value in told:
        if value != facts[aspect]:
            reward -= 1.0
        elif aspect in wanted:
            reward += 1.0
        else:
            reward -= 0.5
        wanted.discard(aspect)
    return reward


def best_reward(prompt: str) -> float:
    """The reward of a perfect answer: every fact asked for, said politely."""
    return len(_read_prompt(prompt)[1]) + max(MANNERS.values())


def _facts(animal: str) -> dict[str, str]:
    """aspect -> true value."""
    return dict(zip(ASPECTS, ANIMALS[animal], strict=True))


def _listed(words) -> str:
    """`[a, b, c]` as the text `a, b and c`."""
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last


def _read_prompt(prompt: str) -> tuple[str, list[str]]:
    """The animal, and the aspects asked for, in the order of the request."""
    words = re.findall(r"\w+", prompt)
    animal = next(word for word in words if word in ANIMALS)
    return animal, [word for word in words if word in ASPECTS]


def _read_answer(
    animal: str, answer: str
) -> tuple[float, list[tuple[str, str]]] | None:
    """What the manners are worth and the (aspect, value) told; None if malformed."""
    opening = "|".join(map(re.escape, filter(None, MANNERS)))
    match = re.fullmatch(rf"((?:{opening})?)The {animal} (.+)\.", answer)
    if match is None:
        return None
    manners, told = match.groups()
    phrases = re.split(r", | and |\. It ", told)
    if not PHRASES.keys() >= set(phrases):
        return None
    return MANNERS[manners], [PHRASES[phrase] for phrase in phrases]
