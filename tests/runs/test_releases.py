"""Runs that earlier commits recorded, gone on with: under every release of axolotl.

`tests/data/releases` has a folder for each commit that recorded one:

    c97b1f9    under axolotl 0.19: a checkpoint, and the betas of its run
    92e9327    under axolotl 0.21, before the package got its folders: a checkpoint, the
               cache of the reference's hidden states, and what the run logged

Both are of the run that `train` makes. This records it with the code that is there:

    PYTHONPATH=tests python tests/runs/test_releases.py FOLDER
"""

import contextlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pandas
import pytest
import transformers
from helpers import tiny
from helpers.paths import DATA
from helpers.tiny import CACHED, LORA, reference_text, reference_tokenizer

RECORDED = DATA / "releases"
UNDER_019, WITH_CACHE = RECORDED / "c97b1f9", RECORDED / "92e9327"
# What the recipe of 92e9327 says beside.
CACHED_AND_TRACED = dict(CACHED, edpo_reference_cache="cache", edpo_log_pairs=1)
# The fingerprint of a reference contains it.
TRANSFORMERS_OF_THE_CACHE = "5.20.1"
MODEL = DATA / "reference_run" / "model"
STEPS, SAVED_AT = 20, 13
CHECKPOINT = f"checkpoint-{SAVED_AT}"
# Of a file in edpo_pairs.
TRACE_COLUMNS = (
    "global_step id plus minus step beta margin kl chosen_tokens rejected_tokens "
    "prompt_tokens prompt chosen rejected"
).split()


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


def timeless(log_history: list[dict]) -> list[dict]:
    """Logged entries, without what depends on the machine's speed."""
    times = ("runtime", "per_second", "time")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in times)}
        for entry in log_history
    ]


def go_on(folder: Path, recorded: Path, **keys):
    """The same run from a recorded checkpoint on."""
    checkpoint = folder / "out" / CHECKPOINT
    shutil.copytree(recorded / CHECKPOINT, checkpoint)
    return train(folder, resume_from_checkpoint=str(checkpoint), **keys)


@pytest.fixture(scope="module")
def recorded() -> list[float]:
    return json.loads((UNDER_019 / "betas.json").read_text())


def test_twenty_packed_steps_of_lora_have_the_betas_of_axolotl_019(tmp_path, recorded):
    found = betas(train(tmp_path))
    assert len(found) == STEPS + 1 and len(set(recorded)) > STEPS / 2
    assert found == pytest.approx(recorded, rel=0, abs=1e-6)


def test_a_checkpoint_of_axolotl_019_goes_on_as_if_nothing_had_changed(
    tmp_path, recorded
):
    trainer = go_on(tmp_path, UNDER_019)
    logged = {entry["step"]: entry["kl/beta"] for entry in tiny.logs(trainer)}
    assert logged == pytest.approx(dict(enumerate(recorded[:-1], 1)), rel=0, abs=1e-6)
    assert trainer.controller.beta == pytest.approx(recorded[-1], rel=0, abs=1e-6)
    assert trainer.state.global_step == STEPS


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory):
    """The run of 92e9327 from its checkpoint, with its cache and a trace.

    The cache's only file gets another name, so that a pass which computed it anew would
    add a file.
    """
    folder = tmp_path_factory.mktemp("gone-on")
    shutil.copytree(WITH_CACHE / "cache", folder / "cache")
    (file,) = (folder / "cache").glob("*/*")
    file.rename(file.with_name("recorded.safetensors"))
    before = files(folder / "cache")
    keys = {**CACHED_AND_TRACED, "edpo_reference_cache": str(folder / "cache")}
    trainer = go_on(folder, WITH_CACHE, **keys)
    return folder, trainer, before


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder, by its path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    stats = {str(path.relative_to(folder)): path.stat() for path in paths}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_checkpoint_of_the_commit_before_the_folders_logs_what_that_commit_logged(
    gone_on,
):
    _, trainer, _ = gone_on
    old = json.loads((WITH_CACHE / "logs.json").read_text())
    new = timeless(trainer.state.log_history)
    assert [entry["step"] for entry in old] == [*range(1, STEPS + 1), STEPS]
    assert [{*entry} for entry in new] == [{*entry} for entry in old]
    # the last entry sums the run up, as far as it ran in this process
    for logged, before in zip(new[SAVED_AT:-1], old[SAVED_AT:-1], strict=True):
        assert logged == pytest.approx(before, rel=1e-6, abs=1e-6)


def test_its_cache_is_read_under_the_transformers_that_wrote_it_and_else_made_anew(
    gone_on,
):
    folder, _, before = gone_on
    ((name, recorded),) = before.items()
    after = files(folder / "cache")
    assert after.pop(name) == recorded
    if transformers.__version__ == TRANSFORMERS_OF_THE_CACHE:
        assert not after
    else:
        (added,) = after
        assert Path(added).parent.name != Path(name).parent.name


def test_its_trace_has_the_columns_of_before(gone_on):
    folder, _, _ = gone_on
    (path,) = (folder / "out" / "edpo_pairs").iterdir()
    trace = pandas.read_parquet(path)
    assert [*trace.columns] == TRACE_COLUMNS
    assert trace["global_step"].unique().tolist() == [*range(SAVED_AT + 1, STEPS + 1)]


def record(recorded: Path, **keys) -> None:
    """Writes what a later commit can go on from.

    It is the checkpoint of the run, what it logged, its betas and, if there is one,
    its cache.

    Args:
        recorded: The folder; what is in it is removed.
        **keys: What the recipe says beside.
    """
    shutil.rmtree(recorded, ignore_errors=True)
    unread = shutil.ignore_patterns("README.md", "tokenizer*", "*.bin", "*.jinja")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        trainer = train(Path(), **keys)
        shutil.copytree(Path("out") / CHECKPOINT, recorded / CHECKPOINT, ignore=unread)
        if Path("cache").exists():
            shutil.copytree("cache", recorded / "cache")
    logs = timeless(trainer.state.log_history)
    for name, content in (("logs", logs), ("betas", betas(trainer))):
        (recorded / f"{name}.json").write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve(), **CACHED_AND_TRACED)
