"""The load-balancing loss of a mixture of experts, which TRL adds to the DPO loss.

The forward of the whole model would compute it. But here only its body runs, and in a
packed row each token of a shared prefix belongs to two sequences. So a hook collects
the router logits that the body returns. transformers' loss function for the model then
gets these logits, and the number of sequences that each token belongs to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import PreTrainedModel

from ..upstream import load_balancing_loss, recorded_outputs

LOG = get_logger(__name__)


def has_router_loss(model: PreTrainedModel) -> bool:
    """Whether a mixture of experts returns its router logits; warns if it does not.

    Args:
        model: A causal language model that is a mixture of experts.

    Raises:
        ValueError: If transformers has no router loss for it.
    """
    name = model.config.model_type
    known = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    if not (known and load_balancing_loss(model)):
        raise ValueError(
            f"`base_model` of type {name} is a mixture of experts whose router loss is "
            "not known to `rl: edpo`: use another, or `rl: dpo`"
        )
    returned = "router_logits" in recorded_outputs(model.base_model)
    if not returned:
        LOG.warning(
            f"{name}: this transformers has no router loss for it; none is added."
        )
    return returned


@contextmanager
def collected_router_logits(
    model: PreTrainedModel,
) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Within it, each forward of the body appends its router logits to a list.

    Args:
        model: A causal language model whose body takes `output_router_logits`.

    Yields:
        The list. An entry is a tuple with one tensor per layer, see `router_loss`.
    """
    collected: list[tuple[torch.Tensor, ...]] = []

    def request(module, args, keywords) -> tuple[Any, dict[str, Any]]:
        return args, {**keywords, "output_router_logits": True}

    def collect(module, args, output) -> None:
        collected.append(output.router_logits)
        output.router_logits = None  # else the whole model would compute its loss

    body = model.base_model
    hooks = [
        body.register_forward_pre_hook(request, with_kwargs=True),
        body.register_forward_hook(collect),
    ]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def router_loss(
    model: PreTrainedModel,
    router_logits: tuple[torch.Tensor, ...],
    copies: torch.Tensor,
) -> torch.Tensor:
    """The load-balancing loss (Switch Transformer, arXiv 2101.03961, Eqs. 4-6).

    Args:
        model: A mixture of experts for which `has_router_loss` is true.
        router_logits: One per layer, of shape (rows x length, experts).
        copies: Shape (rows, length), how many sequences a token belongs to.

    Returns:
        Scalar with gradient. It is 1 if each token has one expert and all experts get
        as many tokens.
    """
    average: Any = load_balancing_loss(model)
    return average(router_logits, model.num_experts, model.num_experts_per_tok, copies)


def warn_of_reentrance() -> None:
    """Warns once that reentrant checkpointing removes the router loss's gradient."""
    LOG.warning_once(
        "`use_reentrant: true` takes the gradient from the router loss of a mixture of "
        "experts: it is logged and trains nothing. Set `gradient_checkpointing_kwargs: "
        "{use_reentrant: false}` (with an adapter, TRL forces it under ZeRO-3)."
    )
