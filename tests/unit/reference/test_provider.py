"""provider.py with tensors: when a cached reference is the policy, and what is read."""

from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from axolotl_edpo import background
from axolotl_edpo.data.collator import Examples, PairCollator
from axolotl_edpo.data.pair_id import pair_digest
from axolotl_edpo.distributed import RowGroup
from axolotl_edpo.losses.preference import PreferenceLoss
from axolotl_edpo.models.completion_forward import CompletionForward
from axolotl_edpo.reference import cached_read
from axolotl_edpo.reference.cache import ReferenceCache, tensor_bytes
from axolotl_edpo.reference.kept import KeptPair
from axolotl_edpo.reference.precompute import CacheSettings
from axolotl_edpo.reference.provider import AdapterReference, CachedReference, Phase
from axolotl_edpo.reference.states import ComputedStates, PolicyStates

PAIRS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    {"prompt_ids": [1], "chosen_ids": [6], "rejected_ids": [7, 8, 9]},
]
HIDDEN = [
    KeptPair(torch.full((2, 4), 1.0), torch.full((1, 4), 2.0), (2, 1)),
    KeptPair(torch.full((1, 4), 3.0), torch.full((3, 4), 4.0), (1, 3)),
]
LOGPS = [
    KeptPair(torch.tensor([-1.0]), torch.tensor([-2.0]), (2, 1)),
    KeptPair(torch.tensor([-3.0]), torch.tensor([-4.0]), (1, 3)),
]


class Optimizer:
    def __init__(self, rate: float):
        self.param_groups = [{"lr": rate}]


def batch(*numbers: int) -> dict:
    pairs = [PAIRS[number] for number in numbers]
    sides = [[len(p[side]) for p in pairs] for side in ("chosen_ids", "rejected_ids")]
    return {"examples": Examples(pairs), "lengths": torch.tensor(sum(sides, []))}


def cached(tmp_path, kept: list[KeptPair]) -> CachedReference:
    cache = ReferenceCache(tmp_path, "fingerprint")
    cache.folder.mkdir(parents=True)
    cache.write([pair_digest(pair) for pair in PAIRS], kept)
    cache.open(cache.names())
    live = AdapterReference(CompletionForward(Accelerator(cpu=True)))
    settings, loss = CacheSettings(tmp_path, {}), PreferenceLoss()
    reference = CachedReference(live, settings, loss, 64, "keep_start", 2)
    reference.cache = cache
    return reference


@pytest.fixture
def reference(tmp_path):
    return cached(tmp_path, HIDDEN)


def test_a_batch_gets_the_states_of_its_pairs_all_chosen_first(reference):
    first, second = batch(1, 0), batch(0)
    reference.begin_step([first, second], Optimizer(0.1))
    policy = torch.zeros(7, 4)
    states = reference.states(None, first).given(policy)
    assert states[:, 0].tolist() == [3, 1, 1, 4, 4, 4, 2]
    states = reference.states(None, second).given(policy)
    assert states[:, 0].tolist() == [1, 1, 2]
    assert reference.waited > 0


def test_policy_and_reference_are_equal_until_a_step_has_a_learning_rate(reference):
    reference.phase, policy = Phase.EQUAL, torch.ones(3, 4, requires_grad=True)
    for rate in (0.0, 0.1):
        assert isinstance(reference.states(None, batch(0)), PolicyStates)
        reference.begin_step([batch(0)], Optimizer(rate))
        states = reference.states(None, batch(0)).given(policy)
        assert torch.equal(states, policy) and not states.requires_grad
        reference.after_step()
    assert reference.phase is Phase.APART
    step = batch(0)
    reference.begin_step([step], Optimizer(0.1))
    assert reference.states(None, step).given(policy)[0, 0] == 1


def test_a_pair_without_states_or_of_other_lengths_is_refused(reference):
    strange = batch(0)
    strange["examples"].pairs = [{**PAIRS[0], "chosen_ids": [9, 9]}]
    with pytest.raises(ValueError, match="a pair is in no data set"):
        reference.prefetch([strange])
    cut = batch(0)
    cut["lengths"] = torch.tensor([1, 1])
    with pytest.raises(ValueError, match="not as long as those of the batch"):
        reference.prefetch([cut])


def part(reference: CachedReference, rank: int) -> dict:
    """The row 1 2 3 4 | 5 1 6 7 | 8 9 and padding, of which a rank has a third."""
    reference.forward.group = RowGroup(3, rank)
    keys = dict(pad_token_id=0, packs=True, shares=True, parts=3, part=rank)
    row = PairCollator(**keys)(PAIRS)
    reference.begin_step([row], Optimizer(0.1))
    return row


@pytest.mark.parametrize(
    ("rank", "own"), enumerate([[1.0, 1.0, 2.0], [3.0, 4.0, 4.0], [4.0]])
)
def test_a_rank_copies_only_the_states_of_its_part(reference, monkeypatch, rank, own):
    pinned, copied = Mock(wraps=background.pinned), Mock(wraps=background.copied)
    monkeypatch.setattr(cached_read, "pinned", pinned)
    monkeypatch.setattr(cached_read, "copied", copied)
    row = part(reference, rank)
    states = reference.states(None, row).given(torch.zeros(len(own), 4))
    assert states[:, 0].tolist() == own
    for copy in (pinned, copied):
        assert copy.call_args.args[0].shape == (len(own), 4)  # of 7 tokens


def test_a_rank_also_checks_the_states_of_other_parts(reference):
    (shard,) = reference.cache.shards
    with shard.path.open("r+b") as file:
        file.seek(shard.path.read_bytes().index(tensor_bytes(HIDDEN[0].chosen)))
        file.write(b"damage")
    row = part(reference, 2)
    with pytest.raises(ValueError, match="damaged while it was in use"):
        reference.states(None, row).given(torch.zeros(1, 4))


def test_a_rank_gets_the_log_probabilities_of_all_answers(tmp_path):
    reference = cached(tmp_path, LOGPS)
    reference.knows_tokens = False
    row = part(reference, 2)
    assert reference.answer_logps(torch.zeros(7), row).tolist() == [-1, -3, -2, -4]


def test_computed_states_are_given_as_they_are():
    states = torch.arange(6.0).view(2, 3)
    assert ComputedStates(states).given(torch.zeros(2, 3)) is states
