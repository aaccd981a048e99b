"""What an evaluation logs does not depend on how its set is cut into batches.

On two ranks: tests/engines, `test_evaluation_counts_every_pair_once`.
"""

import pytest
from helpers import tiny
from helpers.tiers import first, rest
from transformers import TrainerCallback

from axolotl_edpo.upstream import recipe_keys

SFT = dict(dpo_loss_type=["sigmoid", "sft"], dpo_loss_weights=[1.0, 0.5])
SIZES = (1, 3, 4, 10)  # 10 pairs, so that the last batch has 1, 1, 2 and 10
LOSSES = [
    SFT,
    {},
    SFT | dict(dpo_ld_alpha=0.5),
    dict(dpo_loss_type=["ipo"], edpo_control="fixed", edpo_epsilon=None),
    dict(dpo_use_weighting=True),
]


@pytest.fixture
def trained(recipe, parts, tmp_path):
    """A function that trains two steps, with an evaluation set of 10 pairs."""

    def train(**keys):
        data = dict(test_datasets=tiny.dataset(parts["eval"]), eval_steps=5)
        return tiny.train(tmp_path, recipe(max_steps=2, **data, **keys))

    return train


def evaluation(trainer, size: int) -> dict[str, float]:
    """What an evaluation in batches of this size returns, without times."""
    trainer.args.per_device_eval_batch_size = size
    values = trainer.evaluate()
    timing = ("runtime", "second", "_time")
    return {k: v for k, v in values.items() if not k.endswith(timing)}


@pytest.mark.parametrize("keys", first(LOSSES), ids=str)
@pytest.mark.parametrize("packs", [False, pytest.param(True, marks=rest)])
def test_every_mean_is_the_same_whatever_the_batches(trained, keys, packs):
    if "dpo_ld_alpha" in keys and "dpo_ld_alpha" not in recipe_keys():
        pytest.skip("axolotl has this key from 0.21 on")
    trainer = trained(**keys, eval_sample_packing=packs)
    whole, *others = (evaluation(trainer, size) for size in reversed(SIZES))
    assert {"eval_loss", "eval_logps/chosen", "eval_entropy"} <= whole.keys()
    assert not [name for name in whole if name.startswith("eval_loss/")]
    for cut in others:
        assert cut == pytest.approx(whole, rel=1e-5, abs=1e-5)


def test_the_loss_is_that_of_a_step_with_these_pairs(recipe, tmp_path):
    """Eight pairs, a step in three micro-batches and an evaluation in four."""
    pairs = tiny.save_pairs(tmp_path / "eight.jsonl", 8)
    keys = dict(micro_batch_size=3, gradient_accumulation_steps=3, num_epochs=3)
    keys |= dict(datasets=tiny.dataset(pairs), test_datasets=tiny.dataset(pairs))
    keys |= dict(dataset_prepared_path=str(tmp_path / "eight"), eval_steps=1)
    trainer = tiny.train(tmp_path, recipe(**SFT, **keys, eval_batch_size=2))
    steps = [log["loss"] for log in tiny.logs(trainer)]
    after = {log["step"]: log["eval_loss"] for log in tiny.logs(trainer, "eval_loss")}
    assert len(steps) == 3 and {1, 2} <= after.keys()
    for step in (2, 3):  # the weights and β of a step are those after the one before
        assert after[step - 1] == pytest.approx(steps[step - 1], rel=1e-5)


class Seen(TrainerCallback):
    """Keeps what callbacks get of evaluations, as the choice of the best model does."""

    def __init__(self):
        self.losses: list[float] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics["eval_loss"])


def test_callbacks_and_the_best_model_see_what_is_logged(trained):
    trainer, seen = trained(**SFT), Seen()
    trainer.add_callback(seen)
    returned = evaluation(trainer, 4)
    assert seen.losses == [returned["eval_loss"]]
    assert tiny.logs(trainer, "eval_loss")[-1]["eval_loss"] == returned["eval_loss"]
