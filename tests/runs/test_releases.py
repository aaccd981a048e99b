"""One run under every release of axolotl, and a checkpoint of 0.19 that goes on.

`tests/data/releases` was recorded under axolotl 0.19 by this file of commit c97b1f9:

    python tests/runs/test_releases.py      writes the folder anew
"""

import contextlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from helpers import tiny
from helpers.paths import DATA
from helpers.tiny import LORA, reference_text, reference_tokenizer

RECORDED = DATA / "releases"
MODEL = DATA / "reference_run" / "model"
STEPS, SAVED_AT = 20, 13


def save_pairs(path: Path, count: int) -> Path:
    """Random pairs in words of `reference_tokenizer`."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return reference_text(
            [rng.randrange(3, 256) for _ in range(rng.randint(low, high))]
        )

    rows = [
        {"question": text(4, 20), "good": text(3, 24), "bad": text(3, 24)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(folder: Path, **keys):
    """Twenty packed steps of LoRA over weights that no release draws."""
    shutil.copytree(MODEL, folder / "model", dirs_exist_ok=True)
    reference_tokenizer().save_pretrained(folder / "model")
    (data,) = tiny.dataset(save_pairs(folder / "pairs.jsonl", 80))
    del data["field_messages"]
    data["type"] = {
        "field_prompt": "question",
        "field_chosen": "good",
        "field_rejected": "bad",
        "prompt_format": "{prompt}",
        "chosen_format": "{chosen}",
        "rejected_format": "{rejected}",
    }
    recipe = tiny.recipe(folder, folder / "model", folder / "pairs.jsonl", **LORA)
    recipe |= dict(datasets=[data], num_epochs=2, learning_rate=1e-2)
    recipe |= dict(sample_packing=True, adam_epsilon=1e-4, save_strategy="steps")
    return tiny.train(folder, {**recipe, "save_steps": SAVED_AT, **keys})


def betas(trainer) -> list[float]:
    """β of every step, and the next."""
    used = [entry["kl/beta"] for entry in tiny.logs(trainer)]
    return [*used, trainer.controller.beta]


@pytest.fixture(scope="module")
def recorded() -> list[float]:
    return json.loads((RECORDED / "betas.json").read_text())


def test_twenty_packed_steps_of_lora_have_the_betas_of_axolotl_019(tmp_path, recorded):
    found = betas(train(tmp_path))
    assert len(found) == STEPS + 1 and len(set(recorded)) > STEPS / 2
    assert found == pytest.approx(recorded, rel=0, abs=1e-6)


def test_a_checkpoint_of_axolotl_019_goes_on_as_if_nothing_had_changed(
    tmp_path, recorded
):
    checkpoint = tmp_path / "out" / f"checkpoint-{SAVED_AT}"
    shutil.copytree(RECORDED / checkpoint.name, checkpoint)
    trainer = train(tmp_path, resume_from_checkpoint=str(checkpoint))
    logged = {entry["step"]: entry["kl/beta"] for entry in tiny.logs(trainer)}
    assert logged == pytest.approx(dict(enumerate(recorded[:-1], 1)), rel=0, abs=1e-6)
    assert trainer.controller.beta == pytest.approx(recorded[-1], rel=0, abs=1e-6)
    assert trainer.state.global_step == STEPS


def record() -> None:
    """Writes `tests/data/releases`."""
    shutil.rmtree(RECORDED, ignore_errors=True)
    RECORDED.mkdir()
    unread = shutil.ignore_patterns("README.md", "tokenizer*", "training_args.bin")
    name = f"checkpoint-{SAVED_AT}"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = betas(train(Path()))
        shutil.copytree(Path("out") / name, RECORDED / name, ignore=unread)
    (RECORDED / "betas.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    record()
