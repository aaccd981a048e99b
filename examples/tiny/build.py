"""Make all that the tiny example needs: a language model and preference pairs.

    python examples/tiny/build.py

Into examples/tiny/build/, without a network or a GPU, in about a minute:

    model/        a Llama of 1.1 million parameters with its tokenizer, really trained
    train.jsonl   1500 pairs: two answers sampled from that model, the one with the
                  higher true reward in `chosen`, save for the 10 % that are swapped
    eval.jsonl    200 pairs about requests that no training has seen, none swapped

A pair is a request and two answers of unequal true reward (see world.py). The same
settings give the same files, byte for byte; a build that is there is left alone.
"""

import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from world import all_prompts, true_reward, write_answer

HERE = Path(__file__).parent
BUILD = HERE / "build"


@dataclass(frozen=True)
class Settings:
    """All there is to choose.

    Attributes:
        rounds: How often a prompt of training may be asked; each time has its pair.
    """

    seed: int = 0
    hidden_size: int = 192
    layers: int = 2
    steps: int = 650
    batch_size: int = 16
    train_pairs: int = 1500
    eval_pairs: int = 200
    held_out_prompts: int = 400
    flipped: float = 0.10
    rounds: int = 1


def main(settings: Settings, folder: Path = BUILD) -> None:
    """Build, unless the same build is there already."""
    wanted = manifest(settings)
    done = folder / "manifest.json"
    if done.exists() and done.read_text() == wanted:
        print(f"{folder} is up to date")
        return
    # A build appears under its name when it is whole, or not at all.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="build-") as scratch:
        unfinished = Path(scratch) / "build"
        build(unfinished, settings)
        (unfinished / "manifest.json").write_text(wanted)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    print(f"wrote {', '.join(sorted(p.name for p in folder.iterdir()))} to {folder}")


def build(folder: Path, settings: Settings) -> None:
    """Train the language model, then let it answer and judge the answers."""
    import lm  # slow to import, and a finished build does not need it
    import torch

    # One thread: the same sums on any machine, and as fast as two for so small a model.
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    prompts = all_prompts()
    rng.shuffle(prompts)
    held_out = prompts[: settings.held_out_prompts]
    seen = prompts[settings.held_out_prompts :]

    tokenizer = lm.train_tokenizer(seen + [write_answer(p, rng) for p in seen])
    model = lm.new_model(tokenizer, settings.hidden_size, settings.layers)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    lm.train(model, tokenizer, seen, settings.steps, settings.batch_size, rng)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    answer = partial(lm.sample_answers, model, tokenizer)
    train = make_pairs(answer, seen * settings.rounds, settings.train_pairs)
    flip(train, settings.flipped, rng)
    _write_jsonl(folder / "train.jsonl", train)
    _write_jsonl(
        folder / "eval.jsonl", make_pairs(answer, held_out, settings.eval_pairs)
    )


def make_pairs(answer, prompts: list[str], count: int) -> list[dict[str, str]]:
    """Answer each prompt twice; keep the pairs of unequal true reward.

    Args:
        answer: Makes a list of answers from a list of prompts.
        prompts: What to ask. One that is there twice is answered anew.
        count: How many pairs are wanted.
    """
    pairs: list[dict[str, str]] = []
    for start in range(0, len(prompts), 256):
        batch = prompts[start : start + 256]
        for prompt, one, two in zip(batch, answer(batch), answer(batch), strict=True):
            worse, better = sorted([one, two], key=partial(true_reward, prompt))
            if true_reward(prompt, worse) < true_reward(prompt, better) and worse:
                pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
        if len(pairs) >= count:
            return pairs[:count]
    raise ValueError(f"{len(prompts)} prompts gave {len(pairs)} pairs of {count}")


def flip(pairs: list[dict[str, str]], share: float, rng: random.Random) -> None:
    """Swap chosen and rejected in a share of the pairs: the labels' noise."""
    for pair in rng.sample(pairs, round(share * len(pairs))):
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(settings: Settings) -> str:
    """What a build depends on: the settings and the code."""
    code = b"".join(
        (HERE / name).read_bytes() for name in ("world.py", "lm.py", "build.py")
    )
    digest = hashlib.sha256(code).hexdigest()
    return json.dumps({**asdict(settings), "code": digest}, indent=2) + "\n"


if __name__ == "__main__":
    main(Settings())
