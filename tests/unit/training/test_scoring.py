"""scoring.py on tiny models: by their heads, and by the logits that they return."""

import pytest
import torch
from accelerate import Accelerator
from helpers.token_stats import NAMES, naive
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.models.completion_forward import CompletionForward
from axolotl_edpo.models.lm_head_reader import head_of
from axolotl_edpo.reference.provider import ModelReference
from axolotl_edpo.training.scoring import PairScorer

PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
]
EPSILON = 0.05


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8)
    layers = dict(num_hidden_layers=1, num_attention_heads=1, initializer_range=0.3)
    return LlamaForCausalLM(LlamaConfig(**sizes, **layers))


@pytest.mark.parametrize("reads_head", [True, False], ids=["heads", "logits"])
def test_every_statistic_of_a_token_is_that_of_the_formula(reads_head):
    policy, reference = model(0), model(1)
    reference.lm_head = policy.lm_head
    forward = CompletionForward(Accelerator(cpu=True))
    batch = PairCollator(pad_token_id=0)(PAIRS)
    states = forward.run(policy, batch), forward.run(reference, batch)
    expected = naive(*states, head_of(policy), batch["targets"], EPSILON)
    forward.reads_head = reads_head
    live = ModelReference(forward, reference)
    score = PairScorer(forward, live, EPSILON, sum_sq_probs=True, router_loss=False)
    stats, router_loss = score(policy, batch)
    assert router_loss is None
    for name, ours, formula in zip(NAMES, stats, expected, strict=True):
        torch.testing.assert_close(ours, formula.float(), msg=name)
