"""collator.py on three pairs, and on many against a row that is laid token by token."""

import random

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from axolotl_edpo.data.collator import PairCollator, pairs_in
from axolotl_edpo.data.completions import completions_of
from axolotl_edpo.data.packing import Segments

PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
    {"prompt_ids": [4, 4, 4, 4], "chosen_ids": [6], "rejected_ids": [7, 8]},
]


def test_a_padded_batch_says_which_positions_are_scored():
    batch = PairCollator(pad_token_id=0)(PAIRS[:2])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 5)
    assert batch["positions"].tolist() == [1, 2, 3, 5, 11, 15]
    assert batch["targets"].tolist() == [7, 8, 9, 6, 10, 7]
    assert batch["lengths"].tolist() == [3, 1, 1, 1]
    assert batch["num_tokens"] == 5 + 2 + 3 + 2
    assert batch["chosen_tokens"] == 3 + 1
    assert "completion_mask" not in batch and pairs_in(batch) == 2


def test_tokens_are_counted_alike_padded_packed_and_shared():
    plain = PairCollator(pad_token_id=0)
    packed = PairCollator(pad_token_id=0, packs=True)
    shared = PairCollator(pad_token_id=0, packs=True, shares=True)
    counts = [collator(PAIRS)["num_tokens"] for collator in (plain, packed, shared)]
    assert counts == [23, 23, 23]
    assert packed(PAIRS)["input_ids"].numel() == 23
    assert shared(PAIRS)["input_ids"].numel() == 23 - 2 - 1 - 4


def test_truncation_is_that_of_trl_in_every_layout():
    for packs, shares in ((False, False), (True, False), (True, True)):
        collator = PairCollator(
            pad_token_id=0, max_length=4, packs=packs, shares=shares
        )
        batch = collator([PAIRS[0]])
        assert batch["targets"].tolist() == [7, 8, 10]
        assert batch["lengths"].tolist() == [2, 1]


def test_a_start_cut_off_differently_is_not_shared():
    collator = PairCollator(
        pad_token_id=0,
        max_length=3,
        truncation_mode="keep_end",
        packs=True,
        shares=True,
    )
    batch = collator([PAIRS[2]])  # 4 4 6 and 4 7 8
    assert batch["input_ids"].tolist() == [[4, 4, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1, 2]]
    assert batch["segments"] == Segments((1, 2, 2), (3, 2), ((0, 1), (0, 2)))


def test_balancing_keeps_every_pair_and_spreads_the_tokens():
    collator = PairCollator(pad_token_id=0, packs=True, shares=True)
    batches = collator.balance([PAIRS[:2], PAIRS[2:]])
    # rows of 6, 3 and 7 tokens: 7 against 6 + 3
    assert [batch["input_ids"].numel() for batch in batches] == [7, 9]
    assert [pairs_in(batch) for batch in batches] == [1, 2]
    assert sum(batch["num_tokens"] for batch in batches) == 23
    assert batches[0]["input_ids"].tolist() == [[4, 4, 4, 4, 6, 7, 8]]


@pytest.mark.parametrize("packs", [False, True])
def test_without_pairs_there_is_a_row_that_scores_nothing(packs):
    collator = PairCollator(pad_token_id=0, packs=packs, shares=packs)
    blank = collator([])
    assert blank["input_ids"].numel() > 0
    assert completions_of(blank).positions.shape == (0,)
    assert pairs_in(blank) == blank["num_tokens"] == blank["chosen_tokens"] == 0
    balanced = collator.balance([PAIRS[:1], [], []])
    assert [pairs_in(batch) for batch in balanced] == [1, 0, 0]
    assert [pairs_in(batch) for batch in collator.balance([[], []])] == [0, 0]


def some_pairs(count: int) -> list[dict]:
    """Of few letters: answers that begin alike, are the same, or begin one another."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randint(1, 2) for _ in range(rng.randint(low, high))]

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [
        dict(zip(names, (ids(0, 6), ids(1, 4), ids(1, 4)), strict=True))
        for _ in range(count)
    ]
    assert any(pair["chosen_ids"] == pair["rejected_ids"] for pair in pairs)
    assert any(not pair["prompt_ids"] for pair in pairs)
    return pairs


def cut(collator: PairCollator, pair: dict) -> list[list[tuple[int, bool]]]:
    """Tokens of both sequences, and whether each is scored, as TRL's collator says."""
    padded = DataCollatorForPreference.torch_call(collator, [pair])
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    rows = zip(padded["input_ids"], padded["completion_mask"], lengths, strict=True)
    return [[*zip(a.tolist(), b.bool().tolist(), strict=True)][:n] for a, b, n in rows]


def obvious(collator: PairCollator, pairs: list[dict]) -> dict:
    """A row, token by token: as at the top of packing.py."""
    row, seen, scored = [], [], ([], [])
    for both in (cut(collator, pair) for pair in pairs):
        shared = 0
        while collator.shares and shared < min(map(len, both)):
            if both[0][shared][0] != both[1][shared][0]:
                break
            shared += 1
        start = [*range(len(row), len(row) + shared)]
        row += [(both[0][k][0], k, 2) for k in range(shared)]
        seen += [start[: k + 1] for k in range(shared)]
        for side, tokens in enumerate(both):
            places = [*start, *range(len(row), len(row) + len(tokens) - shared)]
            row += [(tokens[k][0], k, 1) for k in range(shared, len(tokens))]
            seen += [places[: k + 1] for k in range(shared, len(tokens))]
            ks = [k for k in range(1, len(tokens)) if tokens[k][1]]
            scored[side].append([(places[k - 1], tokens[k][0]) for k in ks])
    filling = -len(row) % (collator.pad_to_multiple_of or 1)
    places = [*range(len(row), len(row) + filling)]
    row += [(collator.pad_token_id, k, 0) for k in range(filling)]
    seen += [places[: k + 1] for k in range(filling)]
    answers = [*scored[0], *scored[1]]
    names = ("input_ids", "position_ids", "copies")
    return {
        **{n: [list(v)] for n, v in zip(names, zip(*row, strict=True), strict=True)},
        "seen": seen,
        "positions": [place for answer in answers for place, _ in answer],
        "targets": [token for answer in answers for _, token in answer],
        "lengths": [len(answer) for answer in answers],
    }


def seen_in(segments: Segments) -> list[list[int]]:
    """The places in a row that each of its tokens sees."""
    places = torch.arange(sum(segments.pieces)).split(segments.pieces)
    seen = []
    for queries, keys in zip(segments.queries, segments.keys, strict=True):
        own = torch.cat([places[piece] for piece in keys]).tolist()
        before = len(own) - queries
        seen += [own[: before + i + 1] for i in range(queries)]
    return seen


def assert_laid(collator: PairCollator, batch: dict, pairs: list[dict]) -> None:
    want = obvious(collator, pairs)
    assert seen_in(batch["segments"]) == want.pop("seen")
    for name, values in want.items():
        assert batch[name].dtype == torch.int64, name
        assert batch[name].tolist() == values, name
    half = len(pairs)
    assert batch["chosen_tokens"] == sum(want["lengths"][:half])
    tokens = [len(one) for pair in pairs for one in cut(collator, pair)]
    assert batch["num_tokens"] == sum(tokens)
    assert batch["examples"].pairs == pairs


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize(
    "truncation",
    [{}, {"max_length": 7}, {"max_length": 7, "truncation_mode": "keep_end"}],
)
@pytest.mark.parametrize("shares", [False, True])
def test_rows_are_those_that_are_laid_token_by_token(shares, truncation, multiple):
    collator = PairCollator(
        pad_token_id=9,
        packs=True,
        shares=shares,
        pad_to_multiple_of=multiple,
        **truncation,
    )
    pairs = some_pairs(60)
    assert_laid(collator, collator(pairs), pairs)
    step = [pairs[:25], pairs[25:28], pairs[28:]]
    balanced = collator.balance(step)
    assert sum(pairs_in(batch) for batch in balanced) == 60
    rows = [batch["copies"].count_nonzero().item() for batch in balanced]
    assert max(rows) - min(rows) <= 12
    for batch in balanced:
        assert_laid(collator, batch, batch["examples"].pairs)
