"""page.py: the words for what is calculated, and whether a card has room."""

import pytest
from helpers.docs_tables import CONFIGS

from axolotl_edpo.tools.memory import Arguments
from axolotl_edpo.tools.model_sizes import sizes_of
from axolotl_edpo.tools.page import CARDS, COLUMNS, fits, lines
from axolotl_edpo.tools.recipe_memory import RecipeMemory

SIZES = sizes_of(CONFIGS["8B"])
REFERENCES = [
    ({}, "  reference      15.0  a second model"),
    (dict(cached=True), "  reference       1.0  its head"),
    (
        dict(cached=True, two_numbers=True),
        "  reference       0.0  nothing but its cache",
    ),
    (
        dict(lora=16),
        "  reference       0.0  none: it is the model with its adapter off",
    ),
    (
        dict(reference_free=True),
        "  reference       0.0  none: the loss has no reference",
    ),
    (dict(engine="zero3"), "  reference       1.9  a second model, sharded"),
]
ENGINES = [
    ("ddp", 1, "One process on 1 GPU"),
    ("ddp", 2, "DDP on 2 GPUs"),
    ("zero1", 8, "ZeRO-1 on 8 GPUs"),
    ("zero2", 1, "ZeRO-2 on 1 GPU"),
    ("zero3", 8, "ZeRO-3 on 8 GPUs"),
    ("fsdp2", 8, "FSDP2 on 8 GPUs"),
]
# The words for the gradients say what `Arguments.memory` counts.
GRADIENTS = [
    (dict(engine="ddp", ranks=1), "15.0  that accumulate between micro-batches"),
    (
        dict(engine="ddp"),
        "29.9  that accumulate between micro-batches, and DDP's buckets",
    ),
    (dict(engine="zero1"), "15.0  that accumulate between micro-batches"),
    (dict(engine="zero2"), "1.9  that accumulate between micro-batches, sharded"),
    (
        dict(engine="fsdp2"),
        "15.0  whole, without `sync_each_batch`",
    ),
    (
        dict(engine="fsdp2", sync=True),
        "1.9  that accumulate between micro-batches, sharded",
    ),
]
PHASES = [
    (dict(), "in a micro-batch: weights to activations"),
    (dict(ranks=1), "in the optimizer step: weights to reference, and step"),
    (
        dict(cached=True),
        "before step 1: all but gradients, head, layer, step",
    ),
]


def shown(assumed: bool = False, **keys) -> list[str]:
    """The lines for 8B under ZeRO-2 on 8 GPUs; keys are of `Arguments`."""
    now = Arguments(SIZES, "zero2", 8, 4096)._replace(**keys)
    return lines(RecipeMemory(now, assumed, "model", 1, 8, 2048, False, False, ()))


@pytest.mark.parametrize(
    ("card", "peak", "found"),
    [
        (24, 24.1, "does not fit"),
        (24, 24.0, "tight"),
        (24, 21.7, "tight"),
        (24, 21.5, "fits"),
        (80, 72.1, "tight"),
        (80, 71.9, "fits"),
    ],
)
def test_a_card_is_tight_if_less_than_a_tenth_is_free(card, peak, found):
    assert fits(card, peak) == found


@pytest.mark.parametrize(("keys", "line"), REFERENCES)
def test_the_line_of_the_reference_says_what_is_in_memory(keys, line):
    assert line in shown(**keys)


@pytest.mark.parametrize(("keys", "line"), GRADIENTS)
def test_the_line_of_the_gradients_says_what_is_counted(keys, line):
    assert f"  gradients   {line.rjust(len(line) + 7 - line.index('  '))}" in shown(
        **keys
    )


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, "model: 8.03 billion weights in 16 bits, all train"),
        (dict(itemsize=4), "model: 8.03 billion weights in 32 bits, all train"),
        # rank 16 on all linear layers of Llama 3 8B
        (
            dict(lora=16, four_bit=True),
            "model: 8.03 billion weights in 4 bits, LoRA of rank 16 trains "
            "41.9 million",
        ),
    ],
)
def test_the_first_line_names_the_model_and_what_trains(keys, line):
    assert shown(**keys)[0] == line


@pytest.mark.parametrize(("engine", "ranks", "line"), ENGINES)
def test_engine_and_gpus_are_named_and_a_number_that_was_assumed(engine, ranks, line):
    assert shown(engine=engine, ranks=ranks)[1] == line
    assumed = shown(assumed=True, engine=engine, ranks=ranks)[1]
    assert assumed == f"{line} (assumed: --gpus sets their number)"


def test_replicas_of_fsdp2_are_named():
    replicas = dict(ranks=8, replicas=2)
    assert shown(engine="fsdp2", **replicas)[1] == "FSDP2 on 8 GPUs, 2 replicas"
    assert shown(engine="ddp", **replicas)[1] == "DDP on 8 GPUs"


@pytest.mark.parametrize(("keys", "text"), PHASES)
def test_the_peak_names_the_parts_that_add_up_to_it(keys, text):
    (line,) = [line for line in shown(**keys) if line.startswith("  peak ")]
    assert line.endswith(text)
    parts = Arguments(SIZES, "zero2", 8, 4096)._replace(**keys).memory
    wanted = {
        "in a": parts._replace(step=0, let_go=0),
        "in the": parts._replace(head=0, layer=0, activations=0, let_go=0),
        "before": parts._replace(gradients=0, head=0, layer=0, step=0),
    }
    (summed,) = [sum(v) for k, v in wanted.items() if text.startswith(f"{k} ")]
    assert summed == pytest.approx(parts.total)


def test_a_recipe_that_fits_everywhere_has_nothing_to_change():
    small = shown(lora=16, four_bit=True)
    assert sum(" GB  fits " in line for line in small) == len(CARDS)
    assert not any(line.startswith("What to change") for line in small)
    assert any(line.startswith("What to change") for line in shown())


@pytest.mark.parametrize("keys", [k for k, _ in REFERENCES + GRADIENTS + PHASES])
def test_lines_have_at_most_80_columns(keys):
    assert max(map(len, shown(assumed=True, **keys))) <= COLUMNS
