"""The calculated memory per GPU, against sizes that are known.

`tests/runs/test_memory_of_ranks.py` has it against what training uses.
"""

import pytest
import torch
from helpers.tiny import LLAMA_8M
from transformers import LlamaConfig

from axolotl_edpo.ops import tile_torch, tile_triton
from axolotl_edpo.tools.memory import NF4, TILES, Arguments
from axolotl_edpo.tools.model_sizes import sizes_of

# The published sizes of Llama 3.
LLAMA = dict(num_key_value_heads=8, vocab_size=128256)
LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, **LLAMA)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    **LLAMA,
)


def test_weights_are_those_of_the_config():
    assert sizes_of(LLAMA_8B).all == 8_030_261_248
    assert sizes_of(LLAMA_70B).all == 70_553_706_496
    tied = LlamaConfig(**LLAMA_8M, tie_word_embeddings=True)
    once, twice = sizes_of(tied), sizes_of(LlamaConfig(**LLAMA_8M))
    assert twice.all - once.all == twice.head == 2048 * 384
    assert twice.all == twice.root + LLAMA_8M["num_hidden_layers"] * twice.layer


def test_an_8b_model_by_hand():
    full = Arguments(sizes_of(LLAMA_8B), "zero2", ranks=8, tokens=4096)
    need, cached = full.memory, full._replace(cached=True).memory
    billions = [round(value / 1e9, 2) for value in need]
    # 8.03 × (2, 2/8, 12/8, 2); 4 × 8.03/8 at the update
    assert billions[:4] == [16.06, 2.01, 12.05, 16.06] and billions[7] == 4.02
    # inputs of 32 layers and of the last norm: 33 × 4096 × 4096 × 2 = 1.11; one layer
    # 4096 × (8 × 4096 + 2 × 2 × (3 × 4096 + ...)): see `sizes_of`
    assert billions[6] == pytest.approx(1.11 + 1.29, abs=0.1)
    # 128256 × 4096 × 2 stay; a resumed run has the rest beside its optimizer, once
    assert cached.reference == 1_050_673_152
    assert cached.reference + cached.let_go == need.reference
    start = need.resident - need.gradients + need.activations
    assert cached.total == pytest.approx(start) and start < need.total
    adapter = full._replace(engine="ddp", ranks=1, lora=16, four_bit=True).memory
    assert adapter.reference == 0 and adapter.weights / 1e9 == pytest.approx(5.9, 0.02)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_loss_without_a_reference_needs_what_two_numbers_need(engine):
    sizes = sizes_of(LLAMA_8B)
    keys = dict(engine=engine, ranks=8, tokens=4096)
    free = Arguments(sizes, **keys, reference_free=True).memory
    numbers = Arguments(sizes, **keys, cached=True, two_numbers=True).memory
    assert free == numbers._replace(let_go=0) and numbers.let_go > 0
    assert free.reference == 0


@pytest.mark.parametrize(
    ("engine", "copies"),
    [("ddp", 2), ("zero1", 1), ("zero2", 1 / 8), ("zero3", 1 / 8)],
)
def test_gradients_of_an_engine_by_hand(engine, copies):
    """DDP has them in its buckets, too; ZeRO divides them from stage 2 on."""
    need = Arguments(sizes_of(LLAMA_8B), engine, ranks=8, tokens=4096).memory
    assert need.gradients == pytest.approx(copies * 2 * 8_030_261_248)


def test_one_gpu_has_no_buckets_of_ddp():
    sizes = sizes_of(LLAMA_8B)
    one, two = (Arguments(sizes, "ddp", n, tokens=4096).memory for n in (1, 2))
    assert (one.gradients, two.gradients) == (2 * 8_030_261_248, 4 * 8_030_261_248)
    assert one._replace(gradients=0) == two._replace(gradients=0)


def test_the_peak_is_that_of_the_phase_that_needs_most():
    need = Arguments(sizes_of(LLAMA_8B), "zero2", ranks=1, tokens=128).memory
    # float32 gradients of all weights, against head, layer and activations
    assert need.step == 4 * 8_030_261_248
    assert need.total == need.phases["step"] == need.resident + need.step
    within = need.head + need.layer + need.activations
    assert need.phases["micro-batch"] == need.resident + within < need.total


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_gpus_that_divide_rows_need_what_their_part_of_the_tokens_needs(engine):
    run = Arguments(sizes_of(LLAMA_8B), engine, ranks=8, tokens=65536)
    divided, whole = run._replace(context=4).memory, run.memory
    assert divided == run._replace(tokens=16384).memory
    assert divided.activations == whole.activations / 4
    assert divided.resident == whole.resident
    assert run._replace(tokens=9, context=4).memory == run._replace(tokens=3).memory


@pytest.mark.parametrize("sync", [False, True])
def test_replicas_of_fsdp2_share_no_weights(sync):
    four = Arguments(sizes_of(LLAMA_8B), "fsdp2", ranks=4, tokens=4096, sync=sync)
    twice = four._replace(ranks=8, replicas=2).memory
    assert twice == four.memory
    assert twice.weights == 2 * 8_030_261_248 / 4


def test_two_numbers_need_no_head_of_the_reference():
    """Llama 3 8B, whose head has 1,050,673,152 bytes, and 4096 tokens."""
    shared = dict(engine="zero2", ranks=8, tokens=4096, cached=True)
    states = Arguments(sizes_of(LLAMA_8B), **shared).memory
    numbers = Arguments(sizes_of(LLAMA_8B), **shared, two_numbers=True).memory
    assert (states.reference, numbers.reference) == (1_050_673_152, 0)
    assert numbers.let_go - states.let_go == 1_050_673_152
    # bf16 hidden states of 4096 tokens, and a tile of float32 logits
    assert 2 * 4096 * 4096 <= states.head - numbers.head <= 6 * 4096 * 4096


def test_tiles_and_four_bits_are_those_in_use():
    assert TILES["cuda"] == (tile_triton.CHUNK, tile_triton.TILE, tile_triton.MATRICES)
    assert TILES["cpu"] == (tile_torch.CHUNK, tile_torch.TILE, tile_torch.MATRICES)
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(1024, 1024)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    used = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert used == pytest.approx(NF4 * weight.numel(), rel=1e-3)
