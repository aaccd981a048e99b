"""The load-balancing loss of a mixture of experts, which TRL adds to the DPO loss.

A model's own forward would compute it, but the walk from batch to loss goes past that
forward, and in a packed row the tokens of a shared prompt stand for two sequences. So
the router's logits are collected on their way out of the body, and the function of the
model's own module gets them with the number of sequences that each token stands for.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import PreTrainedModel

LOG = get_logger(__name__)

_FUNCTION = "load_balancing_loss_func"


def has_router_loss(model: PreTrainedModel) -> bool:
    """Whether a mixture of experts lets its router logits out; warns if not.

    Raises:
        ValueError: If what to do with them is not known.
    """
    name = model.config.model_type
    known = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    if not (known and _average(model)):
        raise ValueError(
            f"`base_model` of type {name} is a mixture of experts whose router loss is "
            "not known to `rl: edpo`: use another, or `rl: dpo`"
        )
    recorded = getattr(model.base_model, "_can_record_outputs", None) or {}
    if "router_logits" not in recorded:
        LOG.warning(
            f"{name}: this transformers has no router loss for it; none is added."
        )
    return "router_logits" in recorded


@contextmanager
def collected_router_logits(
    model: PreTrainedModel,
) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Within it, the body's router logits go into a list, one entry per forward.

    Args:
        model: A causal language model whose body takes `output_router_logits`.
    """
    collected: list[tuple[torch.Tensor, ...]] = []

    def ask(module, args, keywords) -> tuple[Any, dict[str, Any]]:
        return args, {**keywords, "output_router_logits": True}

    def take(module, args, output) -> None:
        collected.append(output.router_logits)
        output.router_logits = None  # the model's own forward would average them

    body = model.base_model
    hooks = [
        body.register_forward_pre_hook(ask, with_kwargs=True),
        body.register_forward_hook(take),
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
    """How unevenly tokens are routed (Switch Transformer, arXiv 2101.03961, Eqs. 4-6).

    Args:
        model: The mixture of experts, see `has_router_loss`.
        router_logits: One per layer, of shape (rows x length, experts).
        copies: Shape (rows, length), how many sequences a token stands for.

    Returns:
        Scalar with gradient; 1 for even routing to one expert.
    """
    average: Any = _average(model)
    return average(router_logits, model.num_experts, model.num_experts_per_tok, copies)


def warn_of_reentrance() -> None:
    """Says once why a router loss has no gradient, which TRL's has not either."""
    LOG.warning_once(
        "`use_reentrant: true` takes the gradient from the router loss of a mixture of "
        "experts: it is logged and trains nothing. Set `gradient_checkpointing_kwargs: "
        "{use_reentrant: false}` (with an adapter, TRL forces it under ZeRO-3)."
    )


def _average(model: PreTrainedModel) -> Callable[..., Any] | None:
    """The function of the module that defines the model; FSDP2 gives it a new class."""
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    found = (getattr(module, _FUNCTION, None) for module in modules)
    return next(filter(None, found), None)
