"""pair_trace.py: what every pair did is in Parquet files, whole, once."""

from functools import partial

import pandas
import pytest
from helpers import tiny
from helpers.killed_runs import train_until_killed
from helpers.tiny import CACHED, LORA

from axolotl_edpo.trainer import EDPOTrainer

TRACED = {"edpo_log_pairs": 1}


def trace(folder) -> pandas.DataFrame:
    """All rows, in the order of steps and pairs."""
    rows = pandas.read_parquet(folder / "edpo_pairs")
    return rows.sort_values(["global_step", "id"], ignore_index=True)


def without_text(rows: pandas.DataFrame) -> pandas.DataFrame:
    return rows.drop(columns=["prompt", "chosen", "rejected"])


@pytest.mark.parametrize(
    "keys",
    [{}, LORA, {"sample_packing": True}, CACHED, {"micro_batch_size": 3}],
    ids=["full", "lora", "packed", "cached", "uneven"],
)
def test_means_of_the_trace_are_what_is_logged(recipe, tmp_path, keys):
    trainer = tiny.train(tmp_path, recipe(num_epochs=2, **TRACED, **keys))
    rows, logs = trace(tmp_path / "out"), tiny.logs(trainer)
    assert sorted(rows["global_step"].unique()) == [entry["step"] for entry in logs]
    assert set(rows["id"].value_counts()) == {2}  # 40 pairs, two epochs
    betas = [entry["kl/beta"] for entry in logs[1:]] + [trainer.controller.beta]
    for entry, beta in zip(logs, betas, strict=True):
        step = rows[rows["global_step"] == entry["step"]]
        assert step["margin"].mean() == pytest.approx(
            entry["rewards/margins"], rel=1e-4
        )
        assert (step["step"] == 1).mean() == pytest.approx(entry["kl/p_epsilon_steps"])
        assert (step["step"] == -1).mean() == pytest.approx(entry["kl/n_epsilon_steps"])
        assert step["beta"].mean() == pytest.approx(beta, rel=1e-6)  # Eq. 6
        tokens = step["chosen_tokens"] + step["rejected_tokens"]
        kl = (step["kl"] * tokens).sum() / tokens.sum()
        assert kl == pytest.approx(entry["kl/policy_ref"], rel=1e-4, abs=1e-9)
    up = (rows["plus"] > 0) & (rows["minus"] < 0)
    assert up.equals(rows["step"] == 1) and 0 < up.sum() < len(rows)


def test_a_pair_is_named_once_with_its_text_and_lengths(recipe, tmp_path):
    trainer = tiny.train(tmp_path, recipe(num_epochs=2, **TRACED))
    rows = trace(tmp_path / "out")
    with_text = rows[rows["prompt"].notna()]
    assert len(with_text) == 40 and set(with_text["global_step"]) == {1, 2, 3, 4, 5}
    decode = partial(trainer.processing_class.decode, skip_special_tokens=True)
    expected = {
        (
            decode(pair["prompt_ids"]),
            decode(pair["chosen_ids"]),
            decode(pair["rejected_ids"]),
            len(pair["prompt_ids"]),
            len(pair["chosen_ids"]),
            len(pair["rejected_ids"]),
        )
        for pair in trainer.train_dataset
    }
    names = ["prompt", "chosen", "rejected"]
    names += [f"{name}_tokens" for name in names]
    assert {*with_text[names].itertuples(index=False, name=None)} == expected
    assert all(prompt.startswith("[user]") for prompt in with_text["prompt"])


def test_every_third_step_is_every_third_step(recipe, tmp_path):
    tiny.train(tmp_path, recipe(num_epochs=2, edpo_log_pairs=3))
    assert trace(tmp_path / "out")["global_step"].value_counts().to_dict() == {
        3: 8,
        6: 8,
        9: 8,
    }


def test_without_the_key_there_is_no_folder(recipe, tmp_path):
    tiny.train(tmp_path, recipe(max_steps=2))
    assert not (tmp_path / "out" / "edpo_pairs").exists()


def test_without_perturbation_there_are_no_steps_in_it(recipe, tmp_path):
    keys = dict(edpo_control="fixed", edpo_epsilon=None, max_steps=2)
    trainer = tiny.train(tmp_path, recipe(**keys, **TRACED))
    rows = trace(tmp_path / "out")
    assert rows[["plus", "minus", "step"]].isna().all(axis=None)
    assert rows["beta"].tolist() == pytest.approx([0.1] * 16)
    last = rows[rows["global_step"] == 2]["margin"].mean()
    assert last == pytest.approx(tiny.logs(trainer)[1]["rewards/margins"], rel=1e-4)


def test_the_trace_changes_nothing_of_the_run(recipe, tmp_path):
    plain = tiny.train(tmp_path, recipe())
    traced = tiny.train(tmp_path, recipe(**TRACED))
    for a, b in zip(tiny.logs(plain), tiny.logs(traced), strict=True):
        assert (a["loss"], a["kl/beta"]) == (b["loss"], b["kl/beta"])


def test_a_killed_run_that_goes_on_has_every_step_once(recipe, tmp_path):
    """SIGKILL after step 12 of 20, a checkpoint every 5; a file half written."""
    keys = dict(num_epochs=4, save_steps=5, save_strategy="steps", **TRACED)
    straight, out = tmp_path / "straight", tmp_path / "out"
    tiny.train(tmp_path, recipe(**keys, output_dir=str(straight)))
    keys = recipe(**keys, auto_resume_from_checkpoints=True)
    train_until_killed(tmp_path, keys, step=12)
    assert sorted(set(trace(out)["global_step"])) == [*range(1, 11)]
    half = out / "edpo_pairs" / ".steps-00000011-00000015-rank7.parquet.partial"
    half.write_bytes(b"PAR1")
    tiny.train(tmp_path, keys)
    pandas.testing.assert_frame_equal(
        without_text(trace(out)), without_text(trace(straight))
    )
    assert not half.exists()


def test_going_on_from_an_early_checkpoint_drops_what_came_after_it(recipe, tmp_path):
    keys = dict(num_epochs=2, save_steps=4, save_strategy="steps", **TRACED)
    tiny.train(tmp_path, recipe(**keys))
    whole = trace(tmp_path / "out")
    keys |= dict(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    tiny.train(tmp_path, recipe(**keys, max_steps=6))
    pandas.testing.assert_frame_equal(
        without_text(trace(tmp_path / "out")),
        without_text(whole[whole["global_step"] <= 6]),
    )


def test_files_of_others_in_its_folder_are_left_alone(recipe, tmp_path):
    folder = tmp_path / "out" / "edpo_pairs"
    folder.mkdir(parents=True)
    others = [folder / "all.parquet", folder / "my-notes-7-x.parquet"]
    for file in others:
        file.write_bytes(b"mine")
    tiny.train(tmp_path, recipe(max_steps=2, **TRACED))
    assert [file.read_bytes() for file in others] == [b"mine", b"mine"]
    assert len([*folder.glob("steps-*.parquet")]) == 1


def test_a_home_directory_is_found(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # axolotl saves the model below a folder called ~
    tiny.train(tmp_path, recipe(max_steps=2, output_dir="~/runs/a", **TRACED))
    assert set(trace(tmp_path / "runs" / "a")["global_step"]) == {1, 2}


def test_a_new_run_in_the_same_folder_begins_a_new_trace(recipe, tmp_path):
    tiny.train(tmp_path, recipe(num_epochs=2, **TRACED))
    tiny.train(tmp_path, recipe(max_steps=3, **TRACED))
    assert set(trace(tmp_path / "out")["global_step"]) == {1, 2, 3}


@pytest.fixture
def stops(monkeypatch):
    """Ctrl-C after the third step."""

    def stop(self, norm=None, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return get(self, norm, **kwargs)

    get = EDPOTrainer._get_grad_norm
    monkeypatch.setattr(EDPOTrainer, "_get_grad_norm", stop)


@pytest.mark.usefixtures("stops")
def test_a_run_that_is_stopped_writes_what_it_noted(recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path, recipe(**TRACED))
    assert set(trace(tmp_path / "out")["global_step"]) == {1, 2, 3, 4}


@pytest.mark.usefixtures("stops")
def test_what_stopped_a_run_is_told_where_the_trace_cannot_be_written(
    recipe, tmp_path, caplog
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "edpo_pairs").write_text("in the way")
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path, recipe(**TRACED))
    assert "edpo_pairs: the last steps are not in it" in caplog.text


@pytest.mark.parametrize(("tokens", "files"), [(1, 10), (2**21, 1)])
def test_files_are_cut_between_steps_and_hold_every_row_once(
    recipe, tmp_path, monkeypatch, tokens, files
):
    """Steps of 4 + 4 pairs; one token is enough in the middle of one."""
    monkeypatch.setattr("axolotl_edpo.training.pair_trace.TOKENS", tokens)
    tiny.train(tmp_path, recipe(num_epochs=2, **TRACED))
    names = sorted(file.name for file in (tmp_path / "out" / "edpo_pairs").iterdir())
    width = 10 // files
    assert names == [
        f"steps-{first:08}-{first + width - 1:08}-rank0.parquet"
        for first in range(1, 11, width)
    ]
    assert len(trace(tmp_path / "out")) == 80
