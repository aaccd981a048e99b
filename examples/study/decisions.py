"""How often the step s of a pair is right in bf16, on pairs and policies of the study.

Policy and reference are rounded to bf16 and run in it. From their hidden states s is
taken in four ways, with ε of the run:

    exact               logits and everything after them in float64
    released, bfloat16  three log-softmaxes and sums of logits rounded to bf16
    released, float32   the same in float32
    ours                `axolotl_edpo.ops.token_stats.token_stats`

and compared with the first.
"""

from pathlib import Path
from typing import Any

import grid  # noqa: F401  # puts ../tiny on the path
import lm
import torch
from grade import read_pairs
from transformers import LlamaForCausalLM

from axolotl_edpo.data.completions import (
    Completions,
    chosen_minus_rejected,
    select_completions,
    sum_per_sequence,
)
from axolotl_edpo.losses import edpo
from axolotl_edpo.models.forward import completion_hidden
from axolotl_edpo.models.lm_head_reader import head_of
from axolotl_edpo.ops.token_stats import token_stats
from axolotl_edpo.training.checkpointing import checkpoints

PAIRS = 256
STAGES = (5, 10, 25, 50)  # optimizer steps, and the last


@torch.no_grad()
def agreement(output: Path, world: Path, epsilon: float) -> list[dict[str, Any]]:
    """Shares of pairs in which s equals that of the float64 oracle.

    Args:
        output: Of a run, with a policy every few steps.
        world: The reference and the pairs.
        epsilon: Of the run.

    Returns:
        One entry per stage: its `step`, the share of pairs that `moves` (exact s is
        not 0), and the share in agreement for each of the other ways.
    """
    saved = {int(path.name.rpartition("-")[2]): path for path in checkpoints(output)}
    pairs = read_pairs(world / "train.jsonl")[:PAIRS]
    reference = _bf16(world / "model")
    encoded = _encode(world, pairs)
    stages = sorted({*STAGES, max(saved)} & saved.keys())
    return [
        {"step": step, **_agreement(_bf16(saved[step]), reference, *encoded, epsilon)}
        for step in stages
    ]


def _agreement(policy, reference, ids, completions: Completions, epsilon) -> dict:
    hidden = [
        completion_hidden(model, {"input_ids": ids}, completions)
        for model in (policy, reference)
    ]
    heads = [head_of(policy), head_of(reference)]
    weights = [head.weight for head in heads]

    def released(dtype: torch.dtype, product: torch.dtype = torch.float32):
        logits = (
            (x.to(product) @ w.to(product).T).to(dtype)
            for x, w in zip(hidden, weights, strict=True)
        )
        return _by_log_softmax(*logits, completions, epsilon)

    exact = released(torch.float64, product=torch.float64)
    stats = token_stats(*hidden, *heads, completions.targets, epsilon)
    found = {
        "ours": edpo.steps(*(_of_pairs(x, completions) for x in stats[2:4])),
        "released, float32": released(torch.float32),
        "released, bfloat16": released(torch.bfloat16),
    }
    return {
        "moves": _share(exact != 0),
        **{name: _share(steps == exact) for name, steps in found.items()},
    }


def _by_log_softmax(h, r, completions: Completions, epsilon: float) -> torch.Tensor:
    """s from the log-softmax of three logits, summed and then compared."""

    def z(logits):
        logps = logits.log_softmax(-1).gather(-1, completions.targets[:, None])[:, 0]
        return _of_pairs(logps, completions)

    z1 = z(h)
    plus, minus = (z((1 + e) * h - e * r) - z1 for e in (epsilon, -epsilon))
    return edpo.steps(plus, minus)


def _of_pairs(values: torch.Tensor, completions: Completions) -> torch.Tensor:
    return chosen_minus_rejected(sum_per_sequence(values, completions.lengths))


def _encode(world: Path, pairs) -> tuple[torch.Tensor, Completions]:
    """All chosen, then all rejected, padded, and their answers."""
    _, tokenizer = lm.load(world / "model")
    prompts = [pair["prompt"] for pair in pairs]
    answers = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    ids, is_answer = lm.encode(tokenizer, prompts * 2, answers)
    return ids, select_completions(ids, is_answer)


def _bf16(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def _share(agrees: torch.Tensor) -> float:
    return agrees.float().mean().item()
