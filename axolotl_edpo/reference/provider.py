"""`PairReference`: the trainer's reference, live or from a cache.

    a model of its own     full fine-tuning
    the policy's weights   without its adapter, or with the adapter as it started
    a cache                its hidden states, precomputed (`precompute_ref_log_probs`);
                           a model of its own is then let go, but for its head

Policy and reference are the same function until the first update with a learning rate
above 0, so every difference of logits is exactly 0 until then. Hidden states that were
computed in other rows differ by rounding, whose sign would decide. So until then the
policy's own hidden states stand for the reference's.
"""

import copy
import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .. import distributed as engine
from ..background import copied, pinned
from ..config.args import PRECOMPUTE
from ..data.packing import Completions, completions_of, model_inputs
from ..errors import refuse
from ..models import forward as backbone
from ..models.switches import without_checkpointing
from ..ops.lm_head import Head, as_autocast
from ..training.batching import PairFeed
from . import precompute
from .fingerprint import identity_of
from .hidden_cache import Store
from .precompute import CacheSettings

LOG = get_logger(__name__)

# Largest relative distance of cached hidden states from live ones that is rounding.
TOLERANCE = 0.1
# Positions whose frequencies follow the longest sequence of a batch.
_STRETCHES = re.compile("dynamic|longrope")


class Reading:
    """Hidden states of a batch's completions, read in the background.

    Args:
        store: Holds them.
        pairs: Digests of the batch's pairs.
        device: That the run is on: where it is a GPU, memory is pinned for it.
        then: The reading of the batch that comes next, started when this one is done:
            no more than two are in memory.
    """

    _reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference-cache")
    _future: Future | None = None

    def __init__(
        self,
        store: Store,
        pairs: list[bytes],
        device: torch.device,
        then: "Reading | None",
    ):
        self._store, self._pairs, self._then = store, pairs, then
        self._device = device

    def start(self) -> None:
        """Begins to read, if nobody has."""
        if self._future is None:
            self._future = self._reader.submit(self._read)

    def result(self, like: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Waits for it, once.

        Args:
            like: Whose device is due and, if there are no pairs, width and dtype.

        Returns:
            Shape (tokens, hidden), all chosen, then all rejected, and the seconds that
            were waited: not for the copy to a GPU, which goes on.

        Raises:
            ValueError: If a file was damaged since it was opened.
        """
        before = perf_counter()
        self.start()
        read = self._future.result()  # type: ignore[union-attr]
        self._future = None
        if self._then is not None:
            self._then.start()
        hidden = like.detach()[:0] if read is None else read
        return copied(hidden, like.device), perf_counter() - before

    def _read(self) -> torch.Tensor | None:
        both = [self._store.read(pair) for pair in self._pairs]
        answers = [answer for side in zip(*both, strict=True) for answer in side]
        return pinned(torch.cat(answers), self._device) if answers else None


class PairReference(PairFeed):
    """The reference side of the trainer.

    Attributes:
        ref_model: A reference that is a model of its own, as its engine wraps it.
        store: The cache, once it is filled.
        waited: Seconds that batches took to find and get what they need of the cache.
    """

    ref_model: Any
    store: Store | None = None
    waited: float = 0.0
    _reads_head = True
    _cache: CacheSettings | None = None
    _kept_head: Head | None = None
    _same, _moves = False, False

    # --- what it is ----------------------------------------------------------------

    def _own_reference(self) -> PreTrainedModel:
        """The reference that is a model of its own, without its engine."""
        return self.accelerator.unwrap_model(self.ref_model)

    @staticmethod
    def _base_reference(
        model: PreTrainedModel, ref_model: PreTrainedModel | None
    ) -> PreTrainedModel:
        """The reference of a recipe without adapter: the policy as it starts."""
        if ref_model is None:
            LOG.warning(
                "`axolotl evaluate` hands over no reference: `base_model` is compared "
                "with itself, so rewards and steps are 0. To compare an adapter with "
                "the model below it, add `--lora-model-dir`."
            )
            return copy.deepcopy(model)
        if backbone.copy_embeddings(model, ref_model):
            LOG.warning(
                "Policy and reference were loaded with different embeddings, as "
                "tokens were added to both: the reference takes the policy's."
            )
        return ref_model

    @staticmethod
    def _require_copyable(model: PeftModel, evaluating: bool) -> None:
        """TRL 1.9 does not copy an adapter of `target_parameters`, 1.14 fails in it.

        Raises:
            ValueError: If such an adapter is trained further.
        """
        if not evaluating and getattr(
            model.peft_config["default"], "target_parameters", None
        ):
            raise ValueError(
                "`lora_model_dir` holds an adapter with `lora_target_parameters`, of "
                "which PEFT cannot hold a second as reference: merge it with `axolotl "
                "merge-lora` and train from there"
            )

    def _settle_reference_adapter(self, evaluating: bool) -> None:
        """The reference of an adapter that is trained further is its own start.

        `axolotl evaluate` trains nothing: there the adapter is compared with the
        model below it. The copy is not saved: a checkpoint that holds two adapters
        resumes neither (transformers then loads the sub-directories only).
        """
        if evaluating:
            if backbone.REFERENCE_ADAPTER in self.model.peft_config:
                self.model.delete_adapter(backbone.REFERENCE_ADAPTER)
            return
        backbone.copy_to_reference_adapter(self.model)
        self.model.save_pretrained = partial(
            self.model.save_pretrained, selected_adapters=["default"]
        )

    # --- what it says --------------------------------------------------------------

    def _positions(self, model, inputs, completions: Completions) -> torch.Tensor:
        """Hidden states or logits at the positions that predict a completion token."""
        lm, inputs = backbone.causal_lm(model), model_inputs(inputs)
        if not self._reads_head:
            return backbone.completion_logits(lm, inputs, completions)
        # as the op reads it: a cache keeps no digits that are rounded away then
        return as_autocast(backbone.completion_hidden(lm, inputs, completions))

    def _reference(
        self, model, inputs, completions: Completions
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Hidden states or logits of the reference, given the policy's.

        A cache is asked when these are there: by then it has read them.
        """
        if self.store is None:
            live = self._live_reference(model, inputs, completions)
            return lambda own: live
        if self._same:
            return torch.Tensor.detach

        def cached(own: torch.Tensor) -> torch.Tensor:
            hidden, waited = inputs["reading"].result(own)
            self.waited += waited
            return hidden

        return cached

    def _live_reference(self, model, inputs, completions: Completions) -> torch.Tensor:
        with self._without_gradient():
            if self.ref_model is not None:
                return self._run(self.ref_model, inputs, completions)
            with backbone.reference_adapter(self.accelerator.unwrap_model(model)):
                return self._run(model, inputs, completions)

    def _run(self, model, inputs, completions: Completions) -> torch.Tensor:
        return self._inside_forward(
            model, lambda unwrapped: self._positions(unwrapped, inputs, completions)
        )

    @contextmanager
    def _without_gradient(self) -> Iterator[None]:
        with torch.no_grad(), without_checkpointing(self.model):
            yield

    @contextmanager
    def _separate_reference_head(self) -> Iterator[tuple[list[nn.Module], Head] | None]:
        """The head of a reference of its own, without modules to run inside."""
        head = self._kept_head
        if self.ref_model is not None:
            head = backbone.head_of(self._own_reference())
        if head is None:
            yield None
            return
        with backbone.whole_head(head) as whole:
            yield [], whole

    # --- cache ---------------------------------------------------------------------

    def _ahead(self, model, batches: list[dict[str, Any]]) -> None:
        """Begins to read what these batches need; before the first, fills the cache.

        Raises:
            ValueError: If a pair is not in the cache.
        """
        if self._cache is None:
            return
        if self.store is None:
            self.store = self._precompute(model, self._cache)
        if self.model.training:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self._moves = any(rate != 0 for rate in rates)
        if not self._same:
            before = perf_counter()
            self._begin_to_read(self.store, batches)
            self.waited += perf_counter() - before

    def _begin_to_read(self, store: Store, batches: list[dict[str, Any]]) -> None:
        """Each batch gets its reading; the first is begun.

        Raises:
            ValueError: If a pair is not in the cache, or not as it is in the batch.
        """
        reading = None
        for batch in reversed(batches):
            pairs = [*map(precompute.pair_digest, batch["examples"].pairs)]
            if not all(pair in store for pair in pairs):
                raise ValueError(
                    f"`{PRECOMPUTE}: true`: a pair is in no data set of the "
                    f"recipe, and so not in the cache: remove `{PRECOMPUTE}`"
                )
            lengths = [*zip(*batch["lengths"].view(2, -1).tolist(), strict=True)]
            if lengths != [*map(store.lengths, pairs)]:
                raise ValueError(
                    f"{store.folder}: its answers are not as long as those of the "
                    "batch: remove the folder, and it is computed anew"
                )
            batch["reading"] = reading = Reading(
                store, pairs, self.args.device, then=reading
            )
        if reading is not None:
            reading.start()

    def stepped(self) -> None:
        """After an optimizer step that was not skipped.

        Without a learning rate, as where a warmup begins, it changed nothing.
        """
        self._same = self._same and not self._moves

    def _precompute(self, model: nn.Module, cache: CacheSettings) -> Store:
        """Fills the cache; a reference of its own is then let go.

        Args:
            model: The policy, as its engine wraps it.
            cache: What the recipe says of it.

        Raises:
            ValueError: If the cache cannot be made, or is not this reference's.
        """
        policy, max_length = self.accelerator.unwrap_model(model), self.args.max_length
        lm = backbone.causal_lm(policy)
        require_cacheable(lm.config, self._reads_head, max_length)
        pairs = precompute.pairs_of(self._datasets(), max_length)
        hidden_of, longest = partial(self._hidden_of, model), pairs[0]
        live = torch.cat(hidden_of([longest.example()])[0])
        self._same = self._begins_as_reference(model, longest.example(), live)
        identity = identity_of(
            policy if self.ref_model is None else self._own_reference(),
            lm,
            live,
            truncation=[max_length, self.args.truncation_mode],
            **cache.more,
        )
        store = Store(cache.folder, identity)
        batch = self.args.per_device_train_batch_size
        precompute.Pass(store, self.accelerator, hidden_of, batch).fill(pairs, live)
        _require_equal(store, longest.digest, live)
        self._let_go(policy)
        return store

    def _begins_as_reference(
        self, model, pair: dict[str, Any], live: torch.Tensor
    ) -> bool:
        """Whether policy and reference are the same function; alike on every rank.

        A run begins so, and an evaluation of no adapter. For who handed over other
        models, the hidden states of a pair are compared, to the last bit.
        """
        policy, batch = self.accelerator.unwrap_model(model), self._laid([pair])
        with self._without_gradient():
            own = self._run(model, batch, completions_of(batch)).cpu()
        new = self.state.global_step == 0
        begins = new if self.is_in_train else not isinstance(policy, PeftModel)
        differs = torch.tensor(int(not (begins and torch.equal(own, live))))
        return not int(self._sum_over_ranks(differs))

    def _datasets(self) -> list[Dataset]:
        """The recipe's."""
        evaluation: Any = self.eval_dataset
        several = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
        return [data for data in (self.train_dataset, *several) if data is not None]

    def _hidden_of(
        self, model, pairs: list[dict[str, Any]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The live reference's, of chosen and rejected of each pair."""
        batch = self._laid(pairs)
        hidden = self._live_reference(model, batch, completions_of(batch)).cpu()
        answers = hidden.split(batch["lengths"].tolist())
        return [*zip(answers[: len(pairs)], answers[len(pairs) :], strict=True)]

    def _laid(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        return self._prepare_inputs(self.collators["train"](pairs))

    def _let_go(self, policy: nn.Module) -> None:
        """Frees a reference of its own; its head stays where the policy's trains."""
        if self.ref_model is None:
            return
        _, head = backbone.shared_reference_head(policy)
        reference: Any = self._own_reference()
        kept: tuple[torch.Tensor, ...] = ()
        if any(tensor.requires_grad for tensor in head.tensors):
            engine.reshard(self.ref_model)
            self._kept_head = _alone(backbone.head_of(reference))
            kept = self._kept_head.tensors
        engine.let_go(reference, kept)
        models = self.accelerator._models
        models[:] = [model for model in models if model is not self.ref_model]
        self.ref_model = reference = None  # else nothing is collected
        gc.collect()


def require_cacheable(config: Any, reads_head: bool, max_length: int | None) -> None:
    """Refuses models whose hidden states are not enough, or depend on other pairs.

    Raises:
        ValueError: Names the reason.
    """
    if not reads_head:
        refuse(
            PRECOMPUTE,
            True,
            "remove it: the head of this `base_model` cannot be read, and logits over "
            "the whole vocabulary would have to be kept",
        )
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [kind for kind in rope.values() if isinstance(kind, dict)]
    for kind in (rope, *by_layer):
        if not _STRETCHES.search(kind.get("rope_type") or ""):
            continue
        trained = kind.get("original_max_position_embeddings")
        trained = trained or config.max_position_embeddings
        if max_length is None or max_length > trained:
            refuse(
                PRECOMPUTE,
                True,
                f"remove it, or set `sequence_len` up to {trained}: beyond that the "
                "positions of this `base_model` depend on the longest sequence of a "
                "batch",
            )


def _alone(head: Head) -> Head:
    """A head that keeps nothing else: on a CPU it is part of a mapped file."""

    def own(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or engine.is_sharded(tensor):
            return tensor
        return tensor.detach().clone() if tensor.device.type == "cpu" else tensor

    return replace(head, weight=own(head.weight), bias=own(head.bias))


def _require_equal(store: Store, pair: bytes, live: torch.Tensor) -> None:
    """The last guard against a cache of something else."""
    cached = torch.cat(store.read(pair)).float()
    distance = float((cached - live.float()).norm() / live.float().norm().clamp(min=1))
    if not distance < TOLERANCE:
        raise ValueError(
            f"{store.folder}: its hidden states are {distance:.0%} away from those of "
            "this reference: remove the folder, and it is computed anew"
        )
