"""lm_head.py: quantized weights row by row, and every part of a head."""

import bitsandbytes as bnb
import pytest
import torch

from axolotl_edpo.ops.lm_head import Head, LowRank, Quantized4bit, Quantized8bit

VOCAB, HIDDEN = 96, 128


def weight(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(VOCAB, HIDDEN, generator=g).to(dtype)


SOME_ROWS = [slice(None), slice(5, 70), torch.tensor([90, 0, 7, 7])]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_4bit_weight_are_those_of_the_library(kind, nested, dtype):
    packed, state = bnb.functional.quantize_4bit(
        weight(dtype), quant_type=kind, compress_statistics=nested, blocksize=64
    )
    whole = bnb.functional.dequantize_4bit(packed, state)
    ours = Quantized4bit(packed, state)
    assert (ours.shape, ours.dtype) == ((VOCAB, HIDDEN), dtype)
    for rows in SOME_ROWS:
        assert torch.equal(ours[rows], whole[rows])


def test_rows_of_an_8bit_weight_are_those_of_the_library():
    values, scales, _ = bnb.functional.int8_vectorwise_quant(weight(torch.float16))
    whole = bnb.functional.int8_vectorwise_dequant(values, scales)
    ours = Quantized8bit(values, scales, torch.float32)
    for rows in SOME_ROWS:
        torch.testing.assert_close(ours[rows], whole[rows].float(), rtol=1e-6, atol=0)


def test_logits_are_weight_lora_bias_scale_and_cap():
    w, x = weight(), torch.linspace(-1, 1, 3 * HIDDEN).view(3, HIDDEN)
    down, up, bias = w[:2], w[:, :2] + 1, w[:, 5]
    head = Head(w, bias, 0.5, 3.0, (LowRank(lambda h: h @ down.T, up),))
    linear = x @ w.T + x @ down.T @ up.T + bias
    want = 3 * torch.tanh(0.5 * linear / 3)
    torch.testing.assert_close(head.logits(x), want, rtol=1e-5, atol=1e-5)
    assert [t.shape for t in head.inputs(x)] == [(3, HIDDEN), (3, 2)]
    assert [id(t) for t in head.tensors] == [id(t) for t in (w, up, bias)]
    slope = head.slope(want)
    numeric = (3 * torch.tanh(0.5 * (linear + 0.01) / 3) - want) / 0.01
    torch.testing.assert_close(slope, numeric, rtol=0, atol=2e-3)
