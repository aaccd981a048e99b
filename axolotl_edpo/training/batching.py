"""`PairFeed`: from a data set to batches of rows, every pair once.

    data loader → examples → those of an optimizer step, on this rank → rows

A data loader hands pairs over as they are. They are laid in rows when the pairs of
their optimizer step are at hand: only then can they be dealt evenly, and what
accelerate repeats so that all ranks have full batches be left out. While a step runs,
the rows of the next one are laid in the background.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import nn

from .. import distributed as engine
from ..background import copied, in_background, on_device, pinned
from ..data.checks import check_tokens, long_pairs
from ..data.collator import PairCollator, keep_examples, pairs_in
from ..data.packing import each_tensor
from ..models.forward import causal_lm
from ..models.packing_support import RowSettings, prepare, tried
from . import finite_checks as guard

LOG = get_logger(__name__)


Batch = dict[str, Any]


class NextStep(NamedTuple):
    """The optimizer step after the one that runs.

    Attributes:
        source: The iterator that its micro-batches are from.
        batches: Its micro-batches, as the data loader hands them over.
        laid: The same in rows.
    """

    source: weakref.ref
    batches: list[Batch]
    laid: "Future[list[Batch]]"


class PairFeed(AxolotlDPOTrainer):
    """The data side of the trainer.

    Attributes:
        rows: How pairs are laid in rows.
        collators: `train` and `eval`, which lay them.
    """

    rows: RowSettings
    collators: dict[str, PairCollator]
    _tried = False
    _new_tokens: Any = 0
    _next: NextStep | None = None

    def _start_feed(self, wanted: RowSettings, models: list) -> None:
        """Once TRL's own collator and the models are there.

        Raises:
            ValueError: If the models are known not to do what the recipe asks for.
        """
        self._collating = vars(self.data_collator)
        self.data_collator: Any = keep_examples
        self._lay_as(prepare(wanted, models))

    def _lay_as(self, settings: RowSettings) -> None:
        """From now on, rows are laid so."""
        self.rows, shares = settings, bool(settings.shares)
        packs = {"train": settings.packs, "eval": settings.eval_packs}
        self.collators = {
            mode: PairCollator(**self._collating, packs=packs[mode], shares=shares)
            for mode in packs
        }

    def try_out(self, model: nn.Module) -> None:
        """Compares packed rows with padded ones, before the first are laid.

        Args:
            model: The policy as its engine wraps it: only there are its weights.

        Raises:
            ValueError: If the model does not do what the recipe asks for.
        """

        def settle(unwrapped: nn.Module) -> None:
            self._lay_as(tried(self.rows, causal_lm(unwrapped)))

        with torch.no_grad():
            self._inside_forward(model, settle)

    def _inside_forward(self, model, method: Callable[[nn.Module], Any]) -> Any:
        return engine.inside_forward(self.accelerator, model, method)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, laid in rows.

        Those of the next step are read before this one runs, and laid meanwhile.

        Returns:
            The batches, and what they hold on all ranks, shape (2,): pairs, and tokens
            of chosen answers.
        """
        read, laid = self._read_before(epoch_iterator, num_batches)
        if laid is None:
            rest = chain(read, epoch_iterator)
            read, _ = super().get_batch_samples(rest, num_batches, device)
            if not read:
                return read, None
            self._try_out_once(self.model_wrapped)
            laid = self._lay(self._pairs_of_step(read))
        self._read_ahead(epoch_iterator, num_batches, device)
        held = torch.tensor([_held(batch) for batch in laid]).sum(dim=0)
        whole = self._sum_over_ranks(held)
        self._new_tokens = self._new_tokens + whole[2]
        # as every step does; where a model that evaluates has other kernels (4 bits on
        # some processors), nothing may be computed with them before
        self.model.train()
        self._ahead(self.model_wrapped, laid)
        return laid, whole[:2].clamp(min=1)  # both are divisors

    def _read_before(
        self, source: Iterator, count: int
    ) -> tuple[list[Batch], list[Batch] | None]:
        """What `_read_ahead` has read of a step.

        Args:
            source: Where the step's micro-batches are from: they are others in the next
                epoch.
            count: How many the step has, unless the data end before.

        Returns:
            The micro-batches, and the same in rows, if they are all of the step.
        """
        step, self._next = self._next, None
        if step is None or step.source() is not source:
            return [], None
        have = len(step.batches)
        whole = have == count or have < count and self._data_ended()
        return step.batches, step.laid.result() if whole else None

    def _read_ahead(self, source: Iterator, count: int, device) -> None:
        """Reads the next step, and lays it in the background.

        Only the main thread reads, at the same place on every rank: a data loader may
        talk to other ranks. It is asked for no more than its last micro-batch: to be
        asked again ends it, which accelerate would see before that one has run.
        """
        if self.state.global_step + 1 >= self.state.max_steps:
            return
        rest = self._until_data_end(source)
        batches, _ = super().get_batch_samples(rest, count, device)
        if batches:
            work = partial(self._lay, self._pairs_of_step(batches))
            laid = in_background(work, "next-step")
            self._next = NextStep(weakref.ref(source), batches, laid)

    def _data_ended(self) -> bool:
        """Whether the epoch's last micro-batch was read; true if nobody can say."""
        loader: Any = self.accelerator.gradient_state.active_dataloader
        return loader is None or loader.end_of_dataloader

    def _until_data_end(self, source: Iterator) -> Iterator[Batch]:
        if self._data_ended():
            return
        for batch in source:
            yield batch
            if self._data_ended():
                return

    def _pairs_of_step(self, batches: list[Batch]) -> list[list[dict[str, Any]]]:
        """The pairs of each micro-batch, once the last of them was read."""
        step = [batch["examples"].pairs for batch in batches]
        return [*step[:-1], self._once(step[-1])]

    def _lay(self, step: list[list[dict[str, Any]]]) -> list[Batch]:
        """The rows of a step; nothing of the trainer changes."""
        collator = self.collators["train"]
        laid = collator.deal(step) if self.rows.deals else [*map(collator, step)]
        pin = partial(pinned, device=self.args.device)
        return [each_tensor(batch, pin) for batch in laid]

    def _prepare_inputs(self, inputs):
        """Copies tensors to the device without waiting for it."""
        copy = partial(copied, device=self.args.device)
        return super()._prepare_inputs(each_tensor(inputs, copy))

    def train(self, *args, **kwargs):
        """Lets go of what was read ahead when the run ends or fails."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._next = None

    def _get_num_items_in_batch(self, batch_samples, device) -> None:
        """Nothing: pairs are counted when it is known which are counted."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As TRL's, over the batch laid in rows."""
        self._try_out_once(model)
        batch = self.collators["eval"](self._once(inputs["examples"].pairs))
        self._ahead(model, [batch])
        return super().prediction_step(model, batch, *args, **kwargs)

    def _ahead(self, model: nn.Module, batches: list[dict[str, Any]]) -> None:
        """Nothing: for whoever has something to do before these batches run."""

    def _try_out_once(self, model: nn.Module) -> None:
        if not self._tried:
            self._tried = True
            self._refuse_broken_weights(model)
            self.try_out(model)

    def _refuse_broken_weights(self, model: nn.Module) -> None:
        """All ranks, each with its part of the weights.

        Raises:
            ValueError: Names the first weight that holds NaN.
        """
        policy = self.accelerator.unwrap_model(model)
        names, weights = zip(*policy.named_parameters(), strict=True)
        flags = guard.nan_flags(weights, self.accelerator.device)
        broken = self._sum_over_ranks(flags).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"`base_model` or checkpoint: {len(broken)} of {len(names)} weights "
                f"hold NaN before the first step, the first is {names[broken[0]]}: "
                "use another"
            )

    def _once(self, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The last micro-batch that was read, without pairs that come a second time.

        Where the pairs at the end of the data are too few for all ranks, accelerate
        begins again.
        """
        loader: Any = self.accelerator.gradient_state.active_dataloader
        ranks, drops = self.accelerator.num_processes, self.args.dataloader_drop_last
        fills = ranks > 1 and self.accelerator.even_batches and not drops
        if not (fills and loader.end_of_dataloader):
            return pairs
        rest = len(loader.dataset) % (ranks * len(pairs))
        before = self.accelerator.process_index * len(pairs)
        return pairs[: max(rest - before, 0)] if rest else pairs

    def training_step(self, model, inputs, *args, **kwargs):
        """As TRL's, without axolotl's cache flush after every micro-batch."""
        step = super(AxolotlDPOTrainer, self).training_step
        loss = step(model, inputs, *args, **kwargs)
        forget_masks(inputs)
        return loss

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """As TRL's; says once which pairs `sequence_len` cost, or teach nothing.

        TRL tells text from messages, and so whether to end an answer with `eos_token`,
        by any one of the columns it knows, in another process by another one: what
        belongs to no pair is left out.
        """
        strange = {"messages", "completion"} & set(dataset.column_names or ())
        prepared = super()._prepare_dataset(
            dataset.remove_columns([*strange]), processing_class, args, dataset_name
        )
        if isinstance(prepared, Dataset):
            check_tokens(dataset_name, prepared)
        if isinstance(prepared, Dataset) and args.max_length is not None:
            dropped = len(dataset) - len(prepared)
            truncated = long_pairs(prepared, args.max_length)
            if dropped or truncated:
                LOG.warning(
                    f"{dataset_name} set, `sequence_len: {args.max_length}`: "
                    f"{dropped} of {len(dataset)} pairs dropped (the prompt alone "
                    f"fills it), {truncated} truncated (an answer ends after it)."
                )
        return prepared

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(
            on_device(values, self.accelerator.device), reduction="sum"
        )


def _held(batch: Batch) -> list[int]:
    """Pairs, tokens of chosen answers, and tokens of all sequences."""
    return [pairs_in(batch), batch["chosen_tokens"], batch["num_tokens"]]


def forget_masks(batch: dict[str, Any]) -> None:
    """What was made for a batch's forward: else it lives to the end of the window."""
    if "segments" in batch:
        batch["segments"].cache.made.clear()
