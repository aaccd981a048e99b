"""What a policy is graded by: true reward, true KL, held-out accuracy.

reward     of answers sampled from the policy, by the world's own rule
KL         of the policy from the reference that training began with, whatever
           reference the run had later. By the chain rule that of whole answers is
               KL(π ‖ π_ref) = E_{y ~ π} Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)),
           summed exactly over the vocabulary at each token of a sampled answer:
           the only sampling error is that of the mean over answers. Answers end
           with the end token or after 48 tokens
accuracy   share of held-out pairs, none of them flipped, in which the log-ratio
           of chosen is above that of rejected; ties count half
"""

import json
import statistics
from pathlib import Path

import grid  # noqa: F401  # puts ../tiny on the path
import lm
import torch
from world import true_reward

AT_ONCE = 200  # answers


def grade(policy, reference, tokenizer, world: Path, answers: int, seed: int) -> dict:
    """All measures of a policy.

    Args:
        policy: On any device, the reference on the same.
        reference: The language model of the world.
        tokenizer: Of both.
        world: Folder of the world, with `eval.jsonl`.
        answers: To sample to each held-out prompt.
        seed: Of the sampling.

    Returns:
        Means, and the standard errors of those over answers. KL in nats.
    """
    pairs = read_pairs(world / "eval.jsonl")
    torch.manual_seed(seed)
    rewards, kls, tokens = [], [], 0
    asked = [pair["prompt"] for pair in pairs] * answers
    for start in range(0, len(asked), AT_ONCE):
        prompts = asked[start : start + AT_ONCE]
        answered, kl, count = _answer(policy, reference, tokenizer, prompts)
        rewards += [true_reward(*both) for both in zip(prompts, answered, strict=True)]
        kls += kl.tolist()
        tokens += count
    return {
        "reward": statistics.mean(rewards),
        "reward_error": _error(rewards),
        "kl": statistics.mean(kls),
        "kl_error": _error(kls),
        "kl_per_token": sum(kls) / tokens,
        "accuracy": accuracy(policy, reference, tokenizer, pairs),
        "answers": len(rewards),
        "answer_tokens": tokens / len(rewards),
    }


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Pairs as build.py wrote them."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracy(policy, reference, tokenizer, pairs: list[dict[str, str]]) -> float:
    """Share of pairs that the implicit reward puts in the order of their labels."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (
        lm.compare(policy, reference, tokenizer, prompts, [p[side] for p in pairs])[0]
        for side in ("chosen", "rejected")
    )
    return ((chosen > rejected) + 0.5 * (chosen == rejected)).mean().item()


@torch.no_grad()
def answer_kl(policy, reference, sampled) -> torch.Tensor:
    """Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)) of each sampled answer.

    Args:
        policy: π.
        reference: π_ref.
        sampled: An `lm.Sampled`.

    Returns:
        Shape (answers,), nats.
    """
    log_p, log_q = (
        model(input_ids=sampled.ids, attention_mask=sampled.attention)
        .logits[:, :-1]
        .log_softmax(-1)
        for model in (policy, reference)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (kl * sampled.is_answer[:, 1:]).sum(-1)


def _answer(policy, reference, tokenizer, prompts):
    """Texts of answers, their KL, and how many tokens they have in all."""
    sampled = lm.sample(policy, tokenizer, prompts)
    kl = answer_kl(policy, reference, sampled)
    return lm.decode(tokenizer, sampled), kl, int(sampled.is_answer.sum())


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5
