"""run_files.py: names of files, without importing what gives them."""

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_edpo import run_files


def test_checkpoints_have_the_names_that_transformers_gives():
    assert run_files.STATE == TRAINER_STATE_NAME
    assert run_files.PREFIX == f"{PREFIX_CHECKPOINT_DIR}-"
