"""`CompletionForward`: runs policy and reference up to hidden states or logits.

The forward ends with hidden states, because the op multiplies them with the head. If
the head cannot be read, the model computes the logits, and the forward ends with them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from axolotl.utils.logging import get_logger
from torch import nn
from transformers import PreTrainedModel

from ..data.completions import completions_of
from ..data.layout import Batch
from ..distributed import row_group, within_forward, within_modules_forward
from ..ops.lm_head import as_autocast
from ..ops.token_stats import logits_stats, token_stats
from .forward import causal_lm, check_causal, completion_hidden, completion_logits
from .lm_head_reader import HeadError, check_head, head_modules, head_of
from .split_row import row_inputs
from .switches import without_checkpointing

LOG = get_logger(__name__)

Answer = TypeVar("Answer")


class CompletionForward:
    """Runs the forward of policy or reference on batches.

    Args:
        accelerator: The run's accelerator, which knows the engine.

    Attributes:
        accelerator: The run's accelerator.
        group: The ranks that divide a row among them.
        reads_head: Whether the forward ends with hidden states; if not, with logits.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.group = row_group(accelerator)
        self.reads_head = True

    def probe(self, policy: nn.Module) -> None:
        """Sets `reads_head`. Call it once, before the first batch.

        Args:
            policy: The policy, wrapped by its engine.

        Raises:
            ValueError: If the model is not causal.
        """

        def check(lm: PreTrainedModel) -> bool:
            check_causal(lm)
            return _is_readable(lm)

        self.reads_head = self.ask(policy, check)

    def ask(
        self, policy: nn.Module, question: Callable[[PreTrainedModel], Answer]
    ) -> Answer:
        """Calls a function inside the policy's forward, where its weights are whole.

        Args:
            policy: The policy, wrapped by its engine.
            question: Gets the causal language model, and runs without gradient.

        Returns:
            What `question` returned.
        """
        answers: list[Answer] = []

        def answer(unwrapped: nn.Module) -> None:
            # returns nothing: ZeRO-3 searches what a forward returns for tensors
            answers.append(question(causal_lm(unwrapped)))

        with torch.no_grad():
            within_forward(self.accelerator, policy, answer)
        return answers[0]

    def run(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs a model that is wrapped by its engine.

        Args:
            model: Policy or reference, wrapped by its engine.
            batch: The batch, see `states`.

        Returns:
            See `states`.
        """
        return within_forward(
            self.accelerator, model, lambda unwrapped: self.states(unwrapped, batch)
        )

    def run_to_logps(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Runs a model that is wrapped by its engine, and its head; no gradient.

        Args:
            model: Policy or reference, wrapped by its engine.
            batch: The batch, see `states`.

        Returns:
            Log-probabilities of the scored tokens, shape (tokens,), nats, float32.
        """
        score = partial(self._token_logps, batch)
        with torch.no_grad():
            return within_forward(self.accelerator, model, score)

    def _token_logps(self, batch: Batch, unwrapped: nn.Module) -> torch.Tensor:
        lm, targets = causal_lm(unwrapped), batch["targets"]
        states = self.states(unwrapped, batch)
        if not self.reads_head:
            return logits_stats(states, None, targets, None).policy_logp

        def score(hidden: torch.Tensor) -> torch.Tensor:
            head = head_of(lm)
            return token_stats(hidden, None, head, None, targets, None).policy_logp

        return within_modules_forward(head_modules(lm), score, states)

    def states(self, unwrapped: nn.Module, batch: Batch) -> torch.Tensor:
        """Hidden states or logits at the positions that predict a completion token.

        Under context parallelism, they are those of this rank's part of the row.

        Args:
            unwrapped: The model, inside its engine's forward.
            batch: The inputs of the model, and the positions that are scored.

        Returns:
            Hidden states of shape (tokens, hidden), or logits of shape (tokens, vocab).
        """
        lm, inputs = causal_lm(unwrapped), row_inputs(batch, self.group)
        completions = completions_of(batch)
        if not self.reads_head:
            return completion_logits(lm, inputs, completions)
        # in the dtype of the op's products, so that a cache does not store a wider one
        return as_autocast(completion_hidden(lm, inputs, completions))


@contextmanager
def without_gradient(model: nn.Module) -> Iterator[None]:
    """Within it, a model runs without gradient and without checkpointing."""
    with torch.no_grad(), without_checkpointing(model):
        yield


def _is_readable(lm: Any) -> bool:
    """Whether the op can read the head; if not, a warning gives the reason and cost."""
    try:
        check_head(lm)
    except HeadError as error:
        vocab = lm.config.get_text_config().vocab_size
        size = vocab * (2 * lm.dtype.itemsize + 8) * 1000 / 2**30
        LOG.warning(
            f"The head of {type(lm).__name__} cannot be read: {error}. The model "
            f"makes its own logits instead: about {size:.1f} GiB more memory per "
            f"1,000 tokens of a micro-batch, slower, and rounded to {lm.dtype}."
        )
        return False
    return True
