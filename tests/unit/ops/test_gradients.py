"""gradients.py: what test_token_stats.py cannot see in gradients of a whole batch."""

import torch

from axolotl_edpo.ops.gradients import scale_rows


def test_the_loss_of_a_pair_scales_16_bit_gradients_without_a_rounding_of_its_own():
    """In units of 2^-7, the step of bf16 from 1 to 2: 128.75, 193.125 and 225.3125.

    The loss itself is 128.75 units; rounded to 129, it would make 129, 194 and 226.
    """
    gradient = torch.tensor([[128.0, 192.0, 224.0], [2.0, 4.0, 8.0]]) / 128
    of_the_loss = torch.tensor([1 + 3 / 512, -0.5])
    (scaled,) = scale_rows([gradient.bfloat16()], of_the_loss)
    assert scaled.dtype == torch.bfloat16
    assert (128 * scaled).tolist() == [[129, 193, 225], [-1, -2, -4]]
