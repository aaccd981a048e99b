"""Several entries of `test_datasets:`: each has the metrics that it has alone."""

import pytest
from helpers import ranks, tiny
from helpers.report_pages import numbers, page_of
from helpers.tiers import only

NAMES = ("easy", "hard")
METRICS = """loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies
kl/avg_steps kl/p_epsilon_steps kl/n_epsilon_steps kl/policy_ref""".split()
KEYS = dict(max_steps=4, eval_steps=2, eval_batch_size=3)
WAYS = [
    {"dpo_loss_type": ["sigmoid", "sft"]},
    {"sample_packing": True},
    tiny.CACHED,
    {"edpo_control": "fixed", "edpo_epsilon": None},
    {"edpo_control": "fixed", "edpo_epsilon": None, **tiny.CACHED},  # no KL
]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, list[dict]]:
    """An entry per set, of seven and of five pairs."""
    folder = tmp_path_factory.mktemp("sets")
    counts = dict(zip(NAMES, (7, 5), strict=True))
    return {
        name: tiny.dataset(tiny.save_pairs(folder / f"{name}.jsonl", count, seed=count))
        for name, count in counts.items()
    }


def evaluations(log: list[dict]) -> list[dict]:
    return [entry for entry in log if "eval_loss" in entry]


def assert_as_alone(log: list[dict], alone: dict[str, list[dict]], abs: float) -> None:
    """The metrics of each set are those of a run that evaluates it alone."""
    for name in NAMES:
        pairs = zip(evaluations(log), evaluations(alone[name]), strict=True)
        for together, single in pairs:
            for metric in METRICS:
                of_set = together.get(f"eval_{name}_{metric}")
                expected = single.get(f"eval_{metric}")
                assert (of_set is None) == (expected is None), metric
                if expected is not None:
                    assert of_set == pytest.approx(expected, rel=1e-5, abs=abs), metric


@pytest.mark.parametrize("way", only(WAYS, lambda way: way in (WAYS[0], WAYS[-1])))
def test_each_set_has_the_metrics_that_it_has_alone(recipe, sets, tmp_path, way):
    def log(of: list[dict]) -> list[dict]:
        keys = recipe(test_datasets=of, **KEYS, **way)
        return tiny.train(tmp_path, keys).state.log_history

    merged = log([*sets["easy"], *sets["hard"]])
    alone = {name: log(sets[name]) for name in NAMES}
    assert_as_alone(merged, alone, 1e-6)
    last, easy, hard = (evaluations(one)[-1] for one in (merged, *alone.values()))
    assert last["eval_easy_rewards/margins"] != last["eval_hard_rewards/margins"]
    if "dpo_loss_type" not in way:  # `sft` is a mean over tokens, not over pairs
        loss = (7 * easy["eval_loss"] + 5 * hard["eval_loss"]) / 12
        assert last["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert not any("eval_easy" in key for key in easy)


@pytest.mark.rest
@pytest.mark.parametrize("packing", [False, True])
def test_ranks_that_hold_no_pair_of_a_set_count_it_too(parts, sets, tmp_path, packing):
    """Of three pairs, one rank has two of one set, the other one of the other."""
    entries = [*sets["easy"], {**sets["hard"][0], "split": "train[:1]"}]
    entries[0] = {**entries[0], "split": "train[:2]"}
    results = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        keys = {**KEYS, "eval_batch_size": 2, "sample_packing": packing or None}
        keys |= {"gradient_accumulation_steps": 2 // count, "ddp_timeout": 120}
        keys |= {"dataset_prepared_path": str(parts["prepared"])}
        keys |= {"test_datasets": entries, "shuffle_merged_datasets": False}
        keys = tiny.recipe(folder, parts["model"], parts["pairs"], **keys)
        results[count] = ranks.run(folder, keys, count)
    (single,), (rank0, rank1) = results[1], results[2]
    for one, zero, other in zip(
        *(evaluations(r["log"]) for r in (single, rank0, rank1)), strict=True
    ):
        for name in NAMES:
            for metric in METRICS:
                key = f"eval_{name}_{metric}"
                assert zero[key] == other[key]
                assert zero[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


@pytest.mark.rest
def test_the_best_model_is_chosen_by_a_set_and_the_report_draws_each(
    recipe, sets, tmp_path
):
    keys = dict(KEYS, save_strategy="steps", save_steps=2, num_epochs=1)
    keys |= dict(load_best_model_at_end=True, metric_for_best_model="eval_hard_loss")
    keys |= dict(test_datasets=[*sets["easy"], *sets["hard"]])
    trainer = tiny.train(tmp_path, recipe(**keys))
    log = evaluations(trainer.state.log_history)
    losses = [e["eval_hard_loss"] for e in log if e["step"] > 0]
    assert trainer.state.best_metric == min(losses)
    page = page_of(tmp_path / "report", tmp_path / "out")
    assert page.text("svg").count("evaluation, hard") == 4  # KL, loss, margin, accuracy
    (result,) = numbers(tmp_path, tmp_path / "out")
    values = [e["eval_easy_rewards/margins"] for e in log]
    assert result["logged"]["eval_easy_rewards/margins"]["values"] == values


def test_data_that_was_prepared_for_one_set_is_prepared_anew(recipe, sets, tmp_path):
    """The number of a pair's set is a column, which the training set is without."""
    folder = str(tmp_path / "prepared")
    keys = recipe(dataset_prepared_path=folder, test_datasets=sets["easy"])
    alone = tiny.load_data(tiny.load_config(tmp_path, keys))
    assert "edpo_set" not in alone.eval_dataset.column_names
    keys["test_datasets"] = [*sets["easy"], *sets["hard"]]
    for _ in ("made", "read again"):
        both = tiny.load_data(tiny.load_config(tmp_path, keys))
        assert sorted(both.eval_dataset["edpo_set"]) == [0] * 7 + [1] * 5
        assert "edpo_set" not in both.train_dataset.column_names
