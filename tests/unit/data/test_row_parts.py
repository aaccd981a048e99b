"""row_parts.py: a row by hand, and that its parts together are the row."""

import pytest
import torch

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.data.row_parts import part_of_row

PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
]


def collate(parts: int = 1, part: int = 0, pairs: list = PAIRS, **keys):
    row = PairCollator(
        pad_token_id=0, packs=True, shares=True, parts=parts, part=part, **keys
    )
    return row(pairs)


def test_the_parts_of_a_row_by_hand():
    """The row is 5 6 7 8 9 10 | 5 6 7, filled up by one token of padding."""
    first, second = (collate(2, part) for part in range(2))
    assert first["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert second["input_ids"].tolist() == [[10, 5, 6, 7, 0]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert second["position_ids"].tolist() == [[2, 0, 1, 1, 0]]
    assert second["copies"].tolist() == [[1, 2, 1, 1, 0]]
    # scored: 7 8 9 | 6 of chosen, 10 | 7 of rejected; both of the second pair by its 5
    assert first["positions"].tolist() == [1, 2, 3, 1]
    assert first["targets"].tolist() == [7, 8, 9, 10]
    assert second["positions"].tolist() == [1, 1] and second["targets"].tolist() == [
        6,
        7,
    ]
    for part in (first, second):
        assert part["part_sizes"] == (4, 2)
        assert part["places"].tolist() == [0, 1, 2, 4, 3, 5]
        assert part["lengths"].tolist() == [3, 1, 1, 1]
        assert part["chosen_tokens"] == 4 and part["num_tokens"] == 12


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_the_parts_make_the_row(count):
    whole = collate(pad_to_multiple_of=count)
    parts = [collate(count, part) for part in range(count)]
    lengths = {part["input_ids"].shape[1] for part in parts}
    assert len(lengths) == 1
    for name in ("input_ids", "position_ids", "copies"):
        joined = torch.cat([part[name] for part in parts], dim=1)
        assert joined.equal(whole[name]), name
    if count == 1:
        return
    (length,) = lengths
    places = parts[0]["places"]
    for name, shift in (("targets", 0), ("positions", length)):
        every = torch.cat([part[name] + shift * i for i, part in enumerate(parts)])
        assert torch.empty_like(every).index_copy(0, places, every).equal(whole[name])
    assert [len(part["targets"]) for part in parts] == [*parts[0]["part_sizes"]]


def test_a_row_without_pairs_has_parts_that_score_nothing():
    for part in range(2):
        batch = collate(2, part, [])
        assert batch["input_ids"].shape == (1, 1) and batch["part_sizes"] == (0, 0)
        assert all(len(batch[name]) == 0 for name in ("targets", "positions", "places"))


def test_the_length_of_a_part_is_a_multiple_of_what_the_recipe_asks_for():
    batch = collate(2, 0, pad_to_multiple_of=4)
    assert batch["input_ids"].shape[1] == 8
    assert part_of_row(collate(pad_to_multiple_of=3), 3, 2)["part_sizes"] == (3, 1, 2)
