"""The released ε-DPO training, naive and in any dtype, with nothing of the package.

It has full logits, three log-softmaxes and a plain AdamW loop. The trainer must equal
it, and the trajectories in tests/data/reference_run.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM


class Step(NamedTuple):
    """One optimizer step of the oracle."""

    loss: float
    beta: float  # used in this step
    up: float  # share of pairs with s = +1
    down: float  # share of pairs with s = -1
    closest: float  # smallest |Δ±| of any pair, nats: how near its step was to another


def batch(pairs):
    """Right-padded token ids, attention mask and completion mask.

    Args:
        pairs: Dicts with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Returns:
        Three tensors of shape (2 x pairs, length): all chosen, then all rejected.
    """
    rows = [
        (p["prompt_ids"], p[key])
        for key in ("chosen_ids", "rejected_ids")
        for p in pairs
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), 2)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        attention[i, :end] = 1
        completion[i, len(prompt) : end] = 1
    return ids, attention, completion


def released_differences(policy, reference, y, mask, epsilon):
    """Δ+ and Δ- of each pair, nats, as the released code forms them.

    Args:
        policy: Logits, shape (2 x pairs, length, vocab).
        reference: The same of the reference.
        y: Targets, shape (2 x pairs, length).
        mask: 1 on completion tokens, shape (2 x pairs, length).
        epsilon: Perturbation.

    Returns:
        Two tensors of shape (pairs,), in the logits' dtype.
    """

    def z(logits):
        logps = logits.log_softmax(-1).gather(-1, y[..., None])[..., 0] * mask
        chosen, rejected = logps.sum(1).chunk(2)
        return chosen - rejected

    plus = z((1 + epsilon) * policy - epsilon * reference) - z(policy)
    minus = z((1 - epsilon) * policy + epsilon * reference) - z(policy)
    return plus, minus


def trajectory(run: Path, name: str, dtype, steps: int, shuffle=None) -> list[Step]:
    """Trains the model of `run` as the released trainer does.

    Args:
        run: The folder reference_run.
        name: Which of its trajectories.
        dtype: Of weights, logits and sums.
        steps: Optimizer steps.
        shuffle: Seed of the order of the pairs; None keeps that of the file.

    Returns:
        A `Step` per optimizer step.
    """
    settings = json.loads((run / f"{name}.json").read_text())
    pairs = json.loads((run / "pairs.json").read_text())
    if shuffle is not None:
        random.Random(shuffle).shuffle(pairs)
    models = [AutoModelForCausalLM.from_pretrained(run / "model") for _ in range(2)]
    policy, reference = (model.to(dtype) for model in models)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings["learning_rate"], weight_decay=0
    )
    beta, history = settings["beta"], []
    for _ in range(steps):
        optimizer.zero_grad()
        out = [
            _micro_batch(policy, reference, pairs[i : i + 4], beta, settings["epsilon"])
            for i in range(0, 16, 4)
        ]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses, s, closest = (torch.cat(values) for values in zip(*out, strict=True))
        up, down = (s == 1).double().mean().item(), (s == -1).double().mean().item()
        history.append(Step(losses.mean().item(), beta, up, down, closest.min().item()))
        betas = beta / (1 + settings["epsilon"] * s.double())
        arithmetic = settings["beta_mean"] == "arithmetic"
        harmonic = beta / (1 + settings["epsilon"] * s.double().mean())
        beta = (betas.mean() if arithmetic else harmonic).item()
    return history


def _micro_batch(policy, reference, pairs, beta, epsilon):
    """Adds the gradient of four pairs to the policy's.

    Returns:
        Losses, steps s and the smaller of |Δ+| and |Δ-|, each of shape (pairs,).
    """
    ids, attention, completion = batch(pairs)
    y, mask = ids[:, 1:], completion[:, 1:]
    a = policy(input_ids=ids, attention_mask=attention).logits[:, :-1]
    with torch.no_grad():
        b = reference(input_ids=ids, attention_mask=attention).logits[:, :-1]
        plus, minus = released_differences(a, b, y, mask, epsilon)
    s = ((plus > 0) & (minus < 0)).long() - ((plus < 0) & (minus > 0)).long()
    logps = [x.log_softmax(-1).gather(-1, y[..., None])[..., 0] * mask for x in (a, b)]
    chosen, rejected = (logps[0].sum(1) - logps[1].sum(1)).chunk(2)
    losses = -F.logsigmoid(beta / (1 + epsilon * s) * (chosen - rejected))
    (losses.sum() / 16).backward()
    return losses.detach(), s, torch.minimum(plus.abs(), minus.abs())
