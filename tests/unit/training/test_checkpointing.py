"""checkpointing.py: an interrupted save is never taken for a complete one."""

import pytest
from accelerate import Accelerator
from axolotl.utils.dict import DictDefault

from axolotl_edpo.training import checkpointing


@pytest.fixture
def run(tmp_path):
    for step in (5, 10, 15, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    for step, text in ((5, "{}"), (10, '{"global_step": 10}'), (15, '{"global_st')):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    return tmp_path


def test_missing_and_truncated_states_are_incomplete(run):
    names = [
        p.name for p in checkpointing.checkpoints(run) if checkpointing.is_complete(p)
    ]
    assert names == ["checkpoint-5", "checkpoint-10"]
    assert checkpointing.last_complete(run).name == "checkpoint-10"


def test_resuming_an_incomplete_checkpoint_names_the_complete_one(run):
    with pytest.raises(ValueError, match=r"checkpoint-20.*interrupted.*checkpoint-10"):
        checkpointing.require_complete(run / "checkpoint-20")
    checkpointing.require_complete(run / "checkpoint-10")


def test_auto_resume_takes_the_newest_complete_checkpoint(run):
    cfg = DictDefault(output_dir=str(run))
    checkpointing.choose_auto_resume(cfg)
    assert cfg.resume_from_checkpoint == str(run / "checkpoint-10")


def test_auto_resume_leaves_a_choice_of_the_user_alone(run):
    cfg = DictDefault(output_dir=str(run), resume_from_checkpoint="mine")
    checkpointing.choose_auto_resume(cfg)
    assert cfg.resume_from_checkpoint == "mine"


def test_a_save_into_an_old_directory_first_makes_it_incomplete(run):
    accelerator = Accelerator(cpu=True)
    for step, writes in ((5, False), (10, True), (25, True)):
        folder = run / f"checkpoint-{step}"
        checkpointing.begin_save(folder, accelerator, writes, moving_reference=None)
    assert checkpointing.last_complete(run).name == "checkpoint-5"


def test_auto_resume_starts_anew_where_no_save_came_to_its_end(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    cfg = DictDefault(output_dir=str(tmp_path), auto_resume_from_checkpoints=True)
    checkpointing.choose_auto_resume(cfg)
    assert cfg.resume_from_checkpoint is None
    assert cfg.auto_resume_from_checkpoints is False
