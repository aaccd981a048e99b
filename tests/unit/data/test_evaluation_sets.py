"""evaluation_sets.py: names of sets."""

import pytest
from axolotl.utils.dict import DictDefault

from axolotl_edpo.data.evaluation_sets import SET, numbered, set_names


def entry(path: str, **more) -> dict:
    return {"path": path, **more}


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([entry("a/easy.jsonl.gz"), entry("b/hard.parquet")], ("easy", "hard")),
        ([entry("me/pairs-v1.5"), entry("me/odd name/")], ("pairs-v1.5", "odd_name")),
        (
            [entry("me/d", split="test"), entry("me/d", split="train[:10%]")],
            ("d_test", "d_train__10__"),
        ),
        (
            [entry("a/d.jsonl"), entry("b/d.jsonl"), entry("e")],
            ("d_all_1", "d_all_2", "e_3"),
        ),
        ([entry("f", data_files=["x/one.json"]), entry("f", data_files=["two.json"])],)
        + (("one", "two"),),
        ([entry("f", data_files=["1.json", "2.json"]), entry("g")], ("f", "g")),
        ([entry("alone.jsonl")], ()),
        (None, ()),
    ],
)
def test_a_set_is_named_like_its_file_and_names_differ(entries, names):
    assert set_names(DictDefault(test_datasets=entries)) == names


def test_where_pairs_may_be_of_two_sets_there_are_none():
    entries = [entry("a"), entry("b")]
    keys = DictDefault(test_datasets=entries, dataset_exact_deduplication=True)
    assert set_names(keys) == ()


def test_a_pair_has_the_number_of_its_entry():
    assert numbered(lambda row: {"prompt": row["q"]}, 2, {"q": "x"}) == {
        "prompt": "x",
        SET: 2,
    }
