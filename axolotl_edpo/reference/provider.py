"""`Reference`: gives what a batch needs of the reference.

Hidden states of each token, or log-probabilities of answers where they are enough.

    ModelReference     a separate model: full fine-tuning
    AdapterReference   the policy's model with another adapter, or with none
    CachedReference    one of these two, that runs before the first step; what is kept
                       of it is then read from disk (`precompute_ref_log_probs`)

Policy and reference are equal until the first update with a learning rate above 0.
Until then every difference of their logits must be exactly 0. Cached hidden states were
computed in other batches and so differ by rounding. The sign of that rounding would
decide the steps s of the first pairs. So the cache is used only after that update.
Before it, the policy's hidden states serve as the reference's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from .. import upstream
from ..data.collator import Examples
from ..data.layout import Batch
from ..distributed import RowGroup, release, reshard, sum_over_ranks
from ..losses.preference import PreferenceLoss
from ..models.completion_forward import CompletionForward, without_gradient
from ..models.forward import causal_lm, reference_adapter
from ..models.lm_head_reader import (
    copy_from_file,
    head_of,
    shared_reference_head,
    whole_head,
)
from ..models.split_row import gather_tokens
from ..ops.lm_head import Head
from .cache import ReferenceCache
from .cacheable import require_cacheable, require_equal
from .cached_read import CachedRead, Stopwatch, reads_of
from .fingerprint import fingerprint_of
from .kept import (
    KL,
    Kept,
    KeptLogps,
    KeptStates,
    LayOut,
    Run,
    answer_logps,
    logps_folder,
)
from .precompute import CacheSettings, PrecomputePass, distinct_pairs
from .states import ComputedStates, PolicyStates, ReferenceStates

LOG = get_logger(__name__)


class Reference:
    """Base class of references.

    Args:
        forward: Runs models up to the head.

    Attributes:
        forward: The argument.
        knows_tokens: Whether it has states of every token; if not, it has only
            log-probabilities of answers.
    """

    knows_tokens = True

    def __init__(self, forward: CompletionForward):
        self.forward = forward

    def states(self, policy: nn.Module, batch: Batch) -> ReferenceStates:
        """The reference's states of a batch; called before the policy's forward.

        Args:
            policy: The policy, wrapped by its engine.
            batch: A batch on the run's device.
        """
        raise NotImplementedError

    def answer_logps(self, policy_logps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """log π_ref of each answer; called in place of `states` if it knows no tokens.

        Args:
            policy_logps: log π_θ of the batch's scored tokens, shape (tokens,), nats.
            batch: A batch on the run's device.

        Returns:
            Shape (2 x pairs,), nats, float64; see `kept.answer_logps`.
        """
        raise NotImplementedError

    @contextmanager
    def separate_head(self) -> Iterator[Head | None]:
        """A context with the reference's head, gathered from all ranks.

        Yields:
            The head, or None if it is part of the policy's model.
        """
        yield None

    def begin_step(self, batches: Sequence[Batch], optimizer: Any) -> None:
        """Prepares for the micro-batches of an optimizer step.

        Args:
            batches: This rank's micro-batches, in the order in which they run.
            optimizer: The optimizer that takes the step.
        """

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Prepares for batches that run next, in this order."""

    def restart(self) -> None:
        """Prepares for the batches of the last call once more."""

    def after_step(self) -> None:
        """Called after an optimizer step that was not skipped."""


class LiveReference(Reference):
    """A reference that runs a model for every batch."""

    def run(self, policy: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs the reference without gradient; see `CompletionForward.states`."""
        raise NotImplementedError

    def run_to_logps(self, policy: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs the reference and its head; see `CompletionForward.run_to_logps`."""
        raise NotImplementedError

    def weights(self, policy: nn.Module) -> nn.Module:
        """The module that holds the reference's weights, without its engine.

        Args:
            policy: The policy without its engine.
        """
        raise NotImplementedError

    def states(self, policy: nn.Module, batch: Batch) -> ComputedStates:
        """Runs the reference."""
        return ComputedStates(self.run(policy, batch))


class ModelReference(LiveReference):
    """A reference that is a separate model.

    Args:
        forward: Runs models up to the head.
        model: The model, wrapped by its engine.
    """

    def __init__(self, forward: CompletionForward, model: nn.Module):
        super().__init__(forward)
        self.wrapped = model

    @property
    def model(self) -> PreTrainedModel:
        """The model without its engine."""
        return self.forward.accelerator.unwrap_model(self.wrapped)

    def run(self, policy: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs the reference's model."""
        with torch.no_grad():
            return self.forward.run(self.wrapped, batch)

    def run_to_logps(self, policy: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs the reference's model and its head."""
        return self.forward.run_to_logps(self.wrapped, batch)

    def weights(self, policy: nn.Module) -> nn.Module:
        """The reference's model."""
        return self.model

    @contextmanager
    def separate_head(self) -> Iterator[Head]:
        """The head of the reference's model."""
        with whole_head(head_of(self.model)) as head:
            yield head

    def release(self, keeps_head: bool) -> Head | None:
        """Frees the weights of the model.

        Args:
            keeps_head: Whether to keep the weights of the head.

        Returns:
            The head, or None if it is not kept.
        """
        model: Any = self.model
        head = None
        if keeps_head:
            reshard(self.wrapped)
            head = copy_from_file(head_of(model))
        release(model, head.tensors if head else ())
        upstream.forget_model(self.forward.accelerator, self.wrapped)
        del self.wrapped
        return head


class AdapterReference(LiveReference):
    """A reference that is the policy's model with the adapter `ref`, or with none."""

    def run(self, policy: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs the policy's model with the reference's adapter, or with none."""
        unwrapped = self.forward.accelerator.unwrap_model(policy)
        with without_gradient(unwrapped), reference_adapter(unwrapped):
            return self.forward.run(policy, batch)

    def run_to_logps(self, policy: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs the policy's model and head with the reference's adapter, or none."""
        unwrapped = self.forward.accelerator.unwrap_model(policy)
        with without_gradient(unwrapped), reference_adapter(unwrapped):
            return self.forward.run_to_logps(policy, batch)

    def weights(self, policy: nn.Module) -> nn.Module:
        """The policy's model."""
        return policy


class Phase(Enum):
    """How policy and reference of a run with a cache are related."""

    EQUAL = "the same function: nothing has been learned yet"
    APART = "the policy may have moved"


class CachedReference(Reference):
    """A reference of which a cache on disk keeps hidden states, or log-probabilities.

    Args:
        live: The reference that computes what is missing. `fill` releases it.
        settings: Settings of the cache.
        loss: The recipe's loss, whose log-probabilities are kept.
        max_length: Sequences are truncated to so many tokens; None: never.
        truncation_mode: Which end of a sequence truncation keeps.
        batch_size: Pairs per forward while the cache is filled.

    Attributes:
        cache: The cache; None before `fill`.
        phase: How policy and reference are related.
        knows_tokens: Whether hidden states are kept; `fill` decides.
        kept_head: The head of the released reference model, if the policy's head
            trains and so differs from it, and hidden states are kept; else None.
    """

    def __init__(
        self,
        live: LiveReference,
        settings: CacheSettings,
        loss: PreferenceLoss,
        max_length: int | None,
        truncation_mode: str,
        batch_size: int,
    ):
        super().__init__(live.forward)
        self.cache: ReferenceCache | None = None
        self.phase = Phase.APART
        self._live: LiveReference | None = live
        self._settings, self._loss, self._batch_size = settings, loss, batch_size
        self._max_length, self._truncation_mode = max_length, truncation_mode
        self.kept_head: Head | None = None
        self._learns = False
        self._reads: dict[Examples, CachedRead] = {}
        self._stopwatch = Stopwatch()

    @property
    def waited(self) -> float:
        """Seconds that batches waited for the disk."""
        return self._stopwatch.seconds

    def states(self, policy: nn.Module, batch: Batch) -> ReferenceStates:
        """The policy's states while both are equal; then those in the cache."""
        if self.phase is Phase.EQUAL:
            return PolicyStates()
        return self._reads[batch["examples"]]

    def answer_logps(self, policy_logps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The policy's while both are equal; then those in the cache."""
        policy = answer_logps(policy_logps.detach(), batch["lengths"], self._loss)
        if self.phase is Phase.EQUAL:
            return policy
        return self._reads[batch["examples"]].given(policy)

    @contextmanager
    def separate_head(self) -> Iterator[Head | None]:
        """The kept head, or None if the policy's head does not train."""
        if self.kept_head is None:
            yield None
            return
        with whole_head(self.kept_head) as head:
            yield head

    def begin_step(self, batches: Sequence[Batch], optimizer: Any) -> None:
        """Starts to read the step's pairs; notes if the learning rate is above 0."""
        self._learns = any(group["lr"] != 0 for group in optimizer.param_groups)
        self.prefetch(batches)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Starts to read the first batch. Each read starts the next one.

        Raises:
            ValueError: If a pair is not in the cache, or has other lengths there.
        """
        if self.phase is Phase.EQUAL:
            return
        with self._stopwatch.running():
            assert self.cache is not None, "`fill` comes first"
            device, watch = self.forward.accelerator.device, self._stopwatch
            # answers are not divided, only tokens
            group = self.forward.group if self.knows_tokens else RowGroup()
            self._reads = reads_of(self.cache, batches, device, watch, group)
            self.restart()

    def restart(self) -> None:
        """Starts to read the first batch of the last `prefetch`."""
        for read in [*self._reads.values()][:1]:
            read.start()

    def after_step(self) -> None:
        """Changes the phase to `APART` if the step's learning rate was above 0."""
        if self._learns:
            self.phase = Phase.APART

    def fill(
        self,
        policy: nn.Module,
        datasets: list[Dataset],
        lay_out: LayOut,
        *,
        is_new: bool,
    ) -> None:
        """Computes missing pairs of the cache, then releases the live reference.

        All ranks call it. Only the first call does anything.

        Args:
            policy: The policy, wrapped by its engine.
            datasets: The recipe's data sets, tokenized.
            lay_out: Lays out pairs.
            is_new: Whether the policy is untrained as far as the run knows. If so, the
                states of a batch decide whether policy and reference are equal.

        Raises:
            ValueError: If the reference cannot be cached, the cache cannot be written,
                or it does not fit the reference.
        """
        if self.cache is not None or self._live is None:
            return
        unwrapped = self.forward.accelerator.unwrap_model(policy)
        lm, live = causal_lm(unwrapped), self._live
        reads_head = self.forward.reads_head or not self._settings.needs_logits
        require_cacheable(lm.config, reads_head, self._max_length)
        pairs = distinct_pairs(datasets, self._max_length)
        longest = lay_out([pairs[0].example()])
        run = self._whole(live.run)
        states = run(policy, longest).cpu()
        if is_new and self._is_equal(policy, longest, states):
            self.phase = Phase.EQUAL
        parts = {"truncation": [self._max_length, self._truncation_mode]}
        parts |= self._settings.fingerprint_parts
        fingerprint = fingerprint_of(live.weights(unwrapped), lm, states, **parts)
        kept_states = KeptStates(run, policy, lay_out, states)
        precompute = self._pass(fingerprint, kept_states)
        self.knows_tokens = self._settings.needs_logits or precompute.index_has(pairs)
        if not self.knows_tokens:
            LOG.info(f"Two log-probabilities per pair are kept: no `{KL}` is logged.")
            run = self._whole(live.run_to_logps)
            kept_logps = KeptLogps(run, policy, lay_out, self._loss)
            precompute = self._pass(logps_folder(fingerprint, self._loss), kept_logps)
            states = torch.cat(kept_logps.of([pairs[0].example()])[0].answers)
        precompute.fill(pairs)
        require_equal(precompute.cache, pairs[0].digest, states)
        self.cache = precompute.cache
        self._release_live(unwrapped)

    def _whole(self, run: Run) -> Run:
        """Runs a reference over a row, and gathers the values of all of its parts."""
        group = self.forward.group
        return lambda policy, batch: gather_tokens(run(policy, batch), batch, group)

    def _pass(self, folder: str, kept: Kept) -> PrecomputePass:
        """Fills a cache, whose folder has this name."""
        cache = ReferenceCache(self._settings.folder, folder)
        accelerator = self.forward.accelerator
        return PrecomputePass(cache, accelerator, kept, self._batch_size)

    def _is_equal(self, policy: nn.Module, batch: Batch, states: torch.Tensor) -> bool:
        """Whether the policy's states of a batch are the reference's, on all ranks.

        Every bit must be equal.

        Args:
            policy: The policy, wrapped by its engine.
            batch: A batch on the run's device.
            states: The reference's states of the batch, shape (tokens, hidden).
        """
        accelerator = self.forward.accelerator
        with without_gradient(accelerator.unwrap_model(policy)):
            own = self._whole(self.forward.run)(policy, batch).cpu()
        differs = not torch.equal(own, states)
        return not int(sum_over_ranks(accelerator, torch.tensor(int(differs))))

    def _release_live(self, policy: nn.Module) -> None:
        """Frees a separate reference model, except a head that is still needed."""
        live, self._live = self._live, None
        if isinstance(live, ModelReference):
            _, head = shared_reference_head(policy)
            trains = any(tensor.requires_grad for tensor in head.tensors)
            self.kept_head = live.release(keeps_head=trains and self.knows_tokens)
