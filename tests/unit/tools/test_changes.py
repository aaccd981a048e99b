"""changes.py: what lowers the peak of a recipe, worked out by `Arguments` itself."""

from dataclasses import replace

import pytest
from helpers.docs_tables import CONFIGS

from axolotl_edpo.tools.changes import changes
from axolotl_edpo.tools.memory import Arguments
from axolotl_edpo.tools.model_sizes import sizes_of
from axolotl_edpo.tools.recipe_memory import RecipeMemory

SIZES = sizes_of(CONFIGS["8B"])
MICRO = "micro_batch_size: 1, gradient_accumulation_steps: 16"
LENGTH = "sequence_len: 1024 (drops or cuts longer pairs)"
CACHE = "precompute_ref_log_probs: true"
NEW = "lora_r: 16, lora_target_linear: true"
FOUR_BIT = "adapter: qlora, load_in_4bit: true"
LORA, QLORA = f"adapter: lora, {NEW}", f"{FOUR_BIT}, {NEW}"
ZERO3 = "deepspeed: deepspeed_configs/zero3_bf16.json"
FSDP2 = "fsdp_version: 2, fsdp_config: …, sync_each_batch: true"
FSDP2_FULL = f"{FSDP2} (16-bit weights train)"


def recipe(**keys) -> RecipeMemory:
    """Of 8B under ZeRO-2 on 8 GPUs, 2 pairs of 2048 tokens; keys are of `Arguments`."""
    now = Arguments(SIZES, "zero2", 8, 8192)._replace(**keys)
    return RecipeMemory(now, False, "model", 2, 8, 2048, False, False, ())


def found(of: RecipeMemory) -> dict[str, float]:
    """The keys of each change, in their order, and its peak."""
    return {change.keys: change.peak for change in changes(of)}


def test_each_change_has_the_peak_of_its_own_calculation_and_the_lowest_is_first():
    def peak(engine="zero2", tokens=8192, **keys):
        return Arguments(SIZES, engine, 8, tokens, **keys).memory.total

    expected = {
        QLORA: peak(lora=16, four_bit=True),
        LORA: peak(lora=16),
        FSDP2_FULL: peak("fsdp2", sync=True),
        ZERO3: peak("zero3"),
        CACHE: peak(cached=True),
        MICRO: peak(tokens=4096),
        LENGTH: peak(tokens=4096),
    }
    assert found(recipe()) == expected
    assert [*found(recipe())] == [*expected]
    assert [*expected.values()] == sorted(expected.values())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        # one GPU shards nothing
        (dict(engine="ddp", ranks=1), {QLORA, LORA, CACHE, MICRO, LENGTH}),
        # neither an adapter has a reference, nor a sharded one much to gain
        (dict(engine="ddp", ranks=1, lora=16), {FOUR_BIT, MICRO, LENGTH}),
        (dict(engine="ddp", ranks=1, lora=16, four_bit=True), {MICRO, LENGTH}),
        # axolotl refuses 4 bits under FSDP2
        (dict(engine="fsdp2"), {LORA, ZERO3, FSDP2_FULL, CACHE, MICRO, LENGTH}),
        (dict(engine="fsdp2", sync=True), {LORA, CACHE, MICRO, LENGTH}),
        (dict(engine="fsdp2", lora=16), {ZERO3, FSDP2, MICRO, LENGTH}),
        (dict(lora=16, four_bit=True), {ZERO3, MICRO, LENGTH}),
        (dict(engine="zero3", cached=True), {QLORA, LORA, FSDP2_FULL, MICRO, LENGTH}),
        (dict(reference_free=True), {QLORA, LORA, FSDP2_FULL, ZERO3, MICRO, LENGTH}),
    ],
)
def test_what_the_recipe_has_and_what_saves_nothing_is_not_named(keys, named):
    of = recipe(**keys)
    assert found(of).keys() == named
    assert all(peak < of.arguments.memory.total for peak in found(of).values())


def test_a_reference_that_moves_is_neither_cached_nor_an_adapter_switched_off():
    named = found(replace(recipe(), moves=True)).keys()
    assert named == {FSDP2_FULL, ZERO3, MICRO, LENGTH}


def test_tokens_that_were_given_follow_the_pairs_and_no_length():
    given = replace(recipe(tokens=3000), given=True)
    assert LENGTH not in found(given)
    assert found(given)[MICRO] == Arguments(SIZES, "zero2", 8, 1500).memory.total
    assert not {MICRO, LENGTH} & found(replace(given, pairs=1)).keys()


def test_embedding_and_head_leave_float32_with_ddp():
    of = recipe(engine="ddp", float32_root=True)
    half = Arguments(SIZES, "ddp", 8, 4096, float32_root=True)
    assert found(of)[LORA] == Arguments(SIZES, "ddp", 8, 8192, lora=16).memory.total
    assert found(of)[ZERO3] == Arguments(SIZES, "zero3", 8, 8192).memory.total
    assert found(of)[MICRO] == half.memory.total
