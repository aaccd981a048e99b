"""`PairFeed`: from a data set to batches of rows, every pair once.

    data loader → examples → those of an optimizer step, on this rank → rows

A data loader hands pairs over as they are. They are laid in rows when the pairs of
their optimizer step are at hand: only then can they be dealt evenly, and what
accelerate repeats so that all ranks have full batches be left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import nn

from . import engine, guard
from .backbone import causal_lm
from .collator import PairCollator, keep_examples, pairs_in
from .pairs import check_tokens, long_pairs
from .rows import RowSettings, prepare, tried

LOG = get_logger(__name__)


class PairFeed(AxolotlDPOTrainer):
    """The data side of the trainer.

    Attributes:
        rows: How pairs are laid in rows.
        collators: `train` and `eval`, which lay them.
    """

    rows: RowSettings
    collators: dict[str, PairCollator]
    _tried = False

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

    def get_batch_samples(self, *args, **kwargs):
        """The micro-batches of an optimizer step, laid in rows.

        Returns:
            The batches, and what they hold on all ranks, shape (2,): pairs, and tokens
            of chosen answers.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        self._try_out_once(self.model_wrapped)
        step = [batch["examples"].pairs for batch in batches]
        step[-1] = self._once(step[-1])
        collator = self.collators["train"]
        laid = collator.deal(step) if self.rows.deals else [*map(collator, step)]
        held = [(pairs_in(batch), batch["chosen_tokens"]) for batch in laid]
        whole = self._sum_over_ranks(torch.tensor(held).sum(dim=0))
        # as every step does; where a model that evaluates has other kernels (4 bits on
        # some processors), nothing may be computed with them before
        self.model.train()
        self._ahead(self.model_wrapped, laid)
        return laid, whole.clamp(min=1)  # both are divisors

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
            values.to(self.accelerator.device), reduction="sum"
        )


def forget_masks(batch: dict[str, Any]) -> None:
    """What was made for a batch's forward: else it lives to the end of the window."""
    if "segments" in batch:
        batch["segments"].cache.made.clear()
