"""completion_forward.py: what a forward ends with."""

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.models.completion_forward import CompletionForward

PAIR = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]}


@pytest.mark.parametrize("casts", [False, True])
def test_hidden_states_leave_in_the_dtype_in_which_the_model_multiplies(casts):
    """Autocast leaves residuals in float32: twice the size, for no digit of a logit."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=100, **tiny.SIZES)).eval()
    forward = CompletionForward(Accelerator(cpu=True))
    batch = PairCollator(pad_token_id=0)([PAIR])
    chosen = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
        states = forward.states(lm, batch)
        expected = lm.model(chosen).last_hidden_state[0, 1:4]
    assert expected.dtype == torch.float32
    assert states.dtype == (torch.bfloat16 if casts else torch.float32)
    torch.testing.assert_close(states[:3], expected.to(states.dtype))
