"""The pass over all ranks: what is computed, and how an error of one rank stops all."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from helpers import processes, ranks

from axolotl_edpo.data.pair_id import pair_digest
from axolotl_edpo.reference import precompute
from axolotl_edpo.reference.cache import ReferenceCache
from axolotl_edpo.reference.kept import KeptPair, KeptStates
from axolotl_edpo.reference.precompute import (
    PrecomputePass,
    distinct_pairs,
    fail_together,
)

WIDTH = 4
ADVICE = (
    r"`precompute_ref_log_probs: true`: cache cannot be used \(\[Errno 28\] No space "
    r"left on device\): name another folder with `edpo_reference_cache`, or remove "
    r"`precompute_ref_log_probs`\. What is already there is whole, .*"
)


def dataset(*answers: int) -> Dataset:
    """A pair per number: a prompt of 2 tokens, answers of so many tokens."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": [1, 2],
                "chosen_ids": [*range(3, 3 + count)],
                "rejected_ids": [*range(4, 4 + count)],
            }
            for count in answers
        ]
    )


class Forwards:
    """A reference whose hidden states are the tokens; counts pairs per forward."""

    def __init__(self):
        self.batches: list[int] = []
        self.size = KeptStates(None, None, None, torch.zeros(1, WIDTH)).size

    def of(self, pairs):
        self.batches.append(len(pairs))
        answers = [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs]
        return [KeptPair(*map(states, both), tuple(map(len, both))) for both in answers]


def states(ids) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.float32)[:, None].expand(-1, WIDTH)


def fill(folder: Path, *datasets: Dataset) -> tuple[ReferenceCache, list[int]]:
    """A filled cache, and the pairs of each forward that it took."""
    cache, forwards = ReferenceCache(folder, "reference"), Forwards()
    accelerator = Accelerator(cpu=True)
    filling = PrecomputePass(cache, accelerator, forwards, batch_size=2)
    filling.fill(distinct_pairs(datasets, max_length=99))
    return cache, forwards.batches


def test_every_pair_is_computed_once_the_longest_first(tmp_path):
    data = dataset(1, 5, 3, 5)
    pairs = distinct_pairs([data, dataset(3)], max_length=99)
    assert [(pair.length, pair.scored_tokens) for pair in pairs] == [
        (12, 10),
        (8, 6),
        (4, 2),
    ]
    cache, batches = fill(tmp_path, data, dataset(3))
    assert batches == [2, 1]
    for pair in data:
        chosen, rejected = cache.read(pair_digest(pair))
        assert torch.equal(chosen, states(pair["chosen_ids"]))
        assert torch.equal(rejected, states(pair["rejected_ids"]))


def test_a_second_pass_computes_what_is_missing(tmp_path):
    before, _ = fill(tmp_path, dataset(1, 2))
    assert fill(tmp_path, dataset(1, 2))[1] == []
    after, batches = fill(tmp_path, dataset(1, 2, 3))
    assert batches == [1]
    assert len(after.names()) == 2 and {*before.names()} == {*after.names()}


def test_shards_hold_so_many_tokens_and_a_longer_pair_is_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "SHARD_TOKENS", 8)
    cache, _ = fill(tmp_path, dataset(9, 3, 1, 2))
    assert sorted(len(shard.pairs) for shard in cache.shards) == [1, 1, 2]
    assert sorted(int(shard.lengths.sum()) for shard in cache.shards) == [6, 6, 18]


def _fill_in_turn(rank: int, port: int, folder: Path) -> None:
    """Writes the pairs of a rank's forwards, and how many pairs it can read."""
    ranks.become(rank, 2, port)
    precompute.SHARD_TOKENS = 8
    data = dataset(9, 3, 1, 2)
    cache, batches = fill(folder / "cache", data)
    read = [cache.read(pair_digest(pair))[0] for pair in data]
    whole = [*map(torch.equal, read, map(states, data["chosen_ids"]))]
    (folder / f"rank{rank}").write_text(f"{batches} {whole.count(True)}")


def test_two_ranks_take_turns_at_the_shards_and_read_all_of_them(tmp_path):
    """Three shards, of 1, 1 and 2 pairs; for the last, rank 1 runs without pairs."""
    processes.run(_fill_in_turn, processes.free_port(), tmp_path, count=2)
    written = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert written == ["[1, 2] 4", "[1, 0] 4"]


def test_a_damaged_shard_is_computed_anew(tmp_path, caplog):
    cache, _ = fill(tmp_path, dataset(1, 2))
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert fill(tmp_path, dataset(1, 2))[1] == [2]
    assert f"{path} is damaged: " in caplog.text and path.read_bytes() == whole


def test_only_a_failing_disk_gets_advice_about_the_disk():
    with fail_together(Path("cache")):
        pass
    with pytest.raises(ValueError, match=ADVICE) as raised:
        with fail_together(Path("cache")):
            raise OSError(28, "No space left on device")
    assert isinstance(raised.value.__cause__, OSError)
    mistake = KeyError("a mistake")
    with pytest.raises(KeyError) as raised:
        with fail_together(Path("cache")):
            raise mistake
    assert raised.value is mistake


class Unsendable(Exception):
    """Cannot be made again from what it says."""

    def __init__(self, name: str, cause: str):
        super().__init__(f"{name}: {cause}")


ERRORS = [
    OSError(28, "No space left on device"),
    KeyError("a mistake"),
    Unsendable("weight", "strange"),
]


def _fails_on_rank_1(rank: int, port: int, folder: Path) -> None:
    """Writes what each rank raises where rank 1 fails, one line per error."""
    ranks.become(rank, 2, port)
    PartialState(cpu=True)
    lines = []
    for failure in ERRORS:
        try:
            with fail_together(Path("cache")):
                if rank == 1:
                    raise failure
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
    (folder / f"rank{rank}").write_text("\n".join(lines))


def test_what_stops_one_rank_stops_all_with_its_words_and_its_type(tmp_path):
    processes.run(_fails_on_rank_1, processes.free_port(), tmp_path, count=2)
    lines = [(tmp_path / f"rank{rank}").read_text().split("\n") for rank in (0, 1)]
    (disk, mistake, strange), (own_disk, own_mistake, own_strange) = lines
    assert disk == own_disk and disk.startswith("ValueError: `precompute_ref_log_probs")
    assert mistake == own_mistake == "KeyError: 'a mistake'"
    assert own_strange == "Unsendable: weight: strange"
    assert strange == "RuntimeError: Unsendable: weight: strange"
