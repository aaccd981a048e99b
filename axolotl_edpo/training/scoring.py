"""`PairScorer`: runs policy and reference, and compares them token by token.

    reference's forward → policy's forward → both heads → `TokenStats`

The reference runs first, without gradient. Both heads are applied inside the policy's
forward, where its engine gathers the weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from ..data.layout import Batch
from ..distributed import within_forward, within_modules_forward
from ..models.completion_forward import CompletionForward
from ..models.forward import causal_lm
from ..models.lm_head_reader import head_modules, head_of, shared_reference_head
from ..models.moe import collected_router_logits, router_loss, warn_of_reentrance
from ..models.split_row import gather_stats
from ..ops.lm_head import Head
from ..ops.token_stats import TokenStats, logits_stats, token_stats
from ..reference.provider import Reference
from ..reference.states import ReferenceStates
from .pair_outcomes import AnswerStats


class PairScorer:
    """Scores the completions of a batch under policy and reference.

    Args:
        forward: Runs models up to the head.
        reference: The run's reference.
        epsilon: ε of the perturbed policies; None unless `edpo_control: epsilon`.
        sum_sq_probs: Whether the statistic Σ p² is needed (`dpo_use_weighting`).
        router_loss: Whether the policy is a mixture of experts with a router loss.
    """

    def __init__(
        self,
        forward: CompletionForward,
        reference: Reference,
        epsilon: float | None,
        *,
        sum_sq_probs: bool,
        router_loss: bool,
    ):
        self._forward, self.reference = forward, reference
        self._epsilon, self._sum_sq_probs = epsilon, sum_sq_probs
        self._router_loss = router_loss

    def __call__(
        self, policy: nn.Module, batch: Batch
    ) -> tuple[TokenStats, torch.Tensor | None]:
        """Runs policy and reference over a batch.

        Args:
            policy: The policy, wrapped by its engine.
            batch: A batch on the run's device.

        Returns:
            Statistics of the scored tokens, also of those that other ranks of the row
            group score; and the router loss, shape (), or None.
        """
        if not self.reference.knows_tokens:
            stats, router = self._compare(policy, batch, None)
            answers = self.reference.answer_logps(stats.policy_logp, batch)
            return AnswerStats.of(stats, answers), router
        return self._compare(policy, batch, self.reference.states(policy, batch))

    def _compare(
        self, policy: nn.Module, batch: Batch, states: ReferenceStates | None
    ) -> tuple[TokenStats, torch.Tensor | None]:
        """Scores the policy beside these states of the reference, or alone."""
        if self._forward.reads_head:
            with self.reference.separate_head() as head:
                score = partial(self._score_by_heads, batch, states, head)
                return self._run(policy, batch, score)
        return self._run(policy, batch, partial(self._score_logits, batch, states))

    def _run(
        self, policy: nn.Module, batch: Batch, score: Callable[[nn.Module], TokenStats]
    ) -> tuple[TokenStats, torch.Tensor | None]:
        """Calls `score` inside the policy's forward, and adds the router loss."""
        forward = partial(self._with_router_loss, batch, score)
        *stats, router = within_forward(self._forward.accelerator, policy, forward)
        learns = policy.training and torch.is_grad_enabled()
        if router is not None and learns and not router.requires_grad:
            warn_of_reentrance()
        whole = gather_stats(TokenStats(*stats), batch, self._forward.group)
        return whole, router

    def _with_router_loss(
        self,
        batch: Batch,
        score: Callable[[nn.Module], TokenStats],
        unwrapped: nn.Module,
    ) -> tuple[torch.Tensor | None, ...]:
        """Statistics and router loss in one flat tuple, which engines can return."""
        lm = causal_lm(unwrapped)
        collected = collected_router_logits(lm) if self._router_loss else nullcontext()
        with collected as router_logits:
            stats = score(unwrapped)
        if router_logits is None:
            return *stats, None
        return *stats, router_loss(lm, router_logits[0], batch["copies"])

    def _score_by_heads(
        self,
        batch: Batch,
        states: ReferenceStates | None,
        reference_head: Head | None,
        unwrapped: nn.Module,
    ) -> TokenStats:
        """Applies both heads to hidden states, tile by tile."""
        lm = causal_lm(unwrapped)
        modules = head_modules(lm)
        if states is not None and reference_head is None:
            shared_modules, reference_head = shared_reference_head(unwrapped)
            modules = [*dict.fromkeys([*modules, *shared_modules])]

        def compare(policy: torch.Tensor) -> TokenStats:
            return token_stats(
                policy,
                None if states is None else states.given(policy),
                head_of(lm),
                reference_head,
                batch["targets"],
                self._epsilon,
                sum_sq_probs=self._sum_sq_probs,
            )

        policy = self._forward.states(unwrapped, batch)
        return within_modules_forward(modules, compare, policy)

    def _score_logits(
        self, batch: Batch, states: ReferenceStates | None, unwrapped: nn.Module
    ) -> TokenStats:
        """Compares the logits that the models return."""
        policy = self._forward.states(unwrapped, batch)
        return logits_stats(
            policy,
            None if states is None else states.given(policy),
            batch["targets"],
            self._epsilon,
            sum_sq_probs=self._sum_sq_probs,
        )
