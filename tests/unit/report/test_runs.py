"""report/runs.py: what is read of a log."""

from pathlib import Path

from axolotl_edpo.report import logged, runs


def test_an_evaluation_without_kl_is_put_where_training_was():
    log = [
        {"step": 0, "eval_rewards/accuracies": 0.0},
        {"step": 2, "kl/policy_ref": 0.25},
        {"step": 4, "kl/policy_ref": 0.5},
        {"step": 5, "eval_rewards/accuracies": 0.75},
    ]
    run = runs.Run(Path("out"), Path("out"), {"global_step": 5, "log_history": log})
    assert runs.path_over_kl(run, logged.ACCURACY) == [(5, 0.5, 0.75)]
    assert runs.path_over_kl(run, logged.MARGIN) == []
