"""pair_id.py: a pair is found by its tokens."""

import numpy as np

from axolotl_edpo.data.pair_id import digest_of, pair_digest


def test_a_pair_is_found_by_its_tokens_and_where_they_are():
    pairs = [
        ([1], [2], [3]),
        ([1, 2], [], [3]),
        ([], [1, 2], [3]),
        ([1], [3], [2]),
        ([1], [2], [3, 0]),
    ]
    assert len({digest_of(pair) for pair in pairs}) == len(pairs)


def test_ids_are_the_same_for_lists_and_arrays_and_from_run_to_run():
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [], "other": 4}
    arrays = [np.array(ids, dtype=np.int32) for ids in ([1, 2], [3], [])]
    assert pair_digest(pair) == digest_of(arrays)
    assert pair_digest(pair).hex() == "fc3b858f8afa3679231f27f2d4eccab1"
