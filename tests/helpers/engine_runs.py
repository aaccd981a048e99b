"""Runs of recipes, in one process and on the ranks of an engine."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from helpers import ranks, tiny
from helpers.engines import engine, series
from helpers.weights import weights

# ten steps of 8 pairs; Adam's default epsilon would make updates of rounding errors
COMMON = dict(num_epochs=2, micro_batch_size=2, adam_epsilon=1e-4, ddp_timeout=120)
PACKED = {"sample_packing": True}


class Runs:
    """Recipes over the parts, in one process and on two ranks."""

    def __init__(self, parts, folder):
        self.parts, self.folder, self._done = parts, folder, {}

    def single(self, **keys) -> list[dict]:
        """On one process, with as many pairs in a step; the same recipe only once."""
        key = json.dumps(keys, sort_keys=True, default=str)
        if key not in self._done:
            folder = self.folder / f"single{len(self._done)}"
            keys = {"gradient_accumulation_steps": 4, **keys}
            self._done[key] = self._run(folder, 1, keys)
        return self._done[key]

    def double(self, name: str, **keys) -> list[dict]:
        """On two ranks under an engine."""
        return self.many(name, 2, **keys)

    def many(self, name: str, count: int, **keys) -> list[dict]:
        """On several ranks under an engine, a step of 8 pairs in all."""
        folder = self.folder / f"many{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        keys = {"gradient_accumulation_steps": 4 // count, **keys}
        return self._run(folder, count, {**engine(folder, name), **keys})

    def _run(self, folder, count, keys):
        probe = keys.pop("probe", None)
        recipe = tiny.recipe(
            folder,
            self.parts[keys.pop("model", "model")],
            self.parts[keys.pop("data", "pairs")],
            **{**COMMON, "dataset_prepared_path": self.parts["prepared"], **keys},
        )
        recipe["dataset_prepared_path"] = str(recipe["dataset_prepared_path"])
        results = ranks.run(folder, recipe, count, probe)
        return [{**result, "out": recipe["output_dir"]} for result in results]


def assert_same_beta(pair: list[dict]) -> None:
    """On both ranks, to the last bit."""
    first, second = pair
    assert series(first, "kl/beta") == series(second, "kl/beta")
    assert first["beta"] == second["beta"]


def assert_same_run(pair: list[dict], single: list[dict]) -> None:
    """The same β on both ranks, and the same run as one process."""
    assert_same_beta(pair)
    (alone,) = single
    first, betas = pair[0], series(pair[0], "kl/beta")
    assert betas == pytest.approx(series(alone, "kl/beta"), abs=1e-6)
    assert first["beta"] == pytest.approx(alone["beta"], abs=1e-6)
    made = {*chain(*alone["log"])}  # steps: by `edpo_control: epsilon` only
    for name in {"kl/p_epsilon_steps", "kl/n_epsilon_steps", "num_tokens"} & made:
        assert series(first, name) == pytest.approx(series(alone, name), abs=1e-6)
    for name in ("loss", "rewards/margins", "kl/policy_ref", "grad_norm"):
        expected = series(alone, name)
        assert series(first, name) == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def assert_same_weights(pair: list[dict], single: list[dict], atol: float) -> None:
    own, other = (weights(Path(results[0]["out"])) for results in (pair, single))
    # a frozen or tied head is saved beside the rest by some and not by others
    assert all("lm_head" in name for name in own.keys() ^ other.keys())
    for name in own.keys() & other.keys():
        torch.testing.assert_close(own[name], other[name], rtol=0, atol=atol)


def assert_same_evaluation(group: list[dict], single: list[dict]) -> None:
    """Ranks evaluate as one process: what the first one logs, in each evaluation."""
    for metric in ("loss", "kl/policy_ref", "rewards/accuracies", "logps/chosen"):
        own, alone = (
            series(results[0], f"eval_{metric}", beside="eval_loss")
            for results in (group, single)
        )
        assert len(own) > 1 and own == pytest.approx(alone, rel=1e-4, abs=1e-5)
