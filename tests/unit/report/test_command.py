"""report/command.py: what is no run is refused in one line."""

import json

import pytest
from helpers.report_pages import refused


@pytest.mark.parametrize("log", [[], [{"step": 3, "train_runtime": 1.5}]], ids=len)
def test_a_state_without_logs_is_named(tmp_path, log):
    state = {"global_step": 3, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert refused(tmp_path).endswith(
        "nothing was logged up to step 3: train with a smaller `logging_steps`"
    )


def test_json_that_no_trainer_wrote_is_named(tmp_path):
    (tmp_path / "trainer_state.json").write_text("[]")
    assert "not written by a trainer" in refused(tmp_path)
