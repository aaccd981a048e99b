"""Rules for the losses without a reference, and for the keys that they alone use."""

from collections.abc import Callable
from typing import Any

from ..errors import quote, refuse
from ..losses.reference_free import REFERENCE_FREE, TERM_KEYS, reference_free
from .args import CACHE, CONTROL, PRECOMPUTE
from .rules import BETA_KEYS, Recipe, Rule, value_at

LOSS = "dpo_loss_type"
# Keys that ask for a reference, or for a distance from it.
OF_A_REFERENCE = (
    PRECOMPUTE,
    CACHE,
    "trl.sync_ref_model",
    "rl_adapter_ref_model",
    "edpo_max_kl",
)


def _types(recipe: Recipe) -> Any:
    return recipe.get(LOSS) or ["sigmoid"]


def _moves_beta(recipe: Recipe) -> bool:
    return bool(reference_free(_types(recipe))) and recipe.get(CONTROL) != "fixed"


def _is_kl(recipe: Recipe) -> bool:
    return str(recipe.get("metric_for_best_model")).endswith("kl/policy_ref")


def _without_reference(key: str) -> Rule:
    return Rule(
        key,
        lambda recipe: value_at(recipe, key) and reference_free(_types(recipe)),
        lambda recipe: f"remove it: {quote(LOSS, _types(recipe))} has no reference",
    )


def _unused_term(key: str) -> Rule:
    def applies(recipe: Recipe) -> bool:
        loss = reference_free(_types(recipe))
        return recipe.get(key) is not None and not (loss and key in loss.keys)

    def remedy(recipe: Recipe) -> str:
        users = ", ".join(n for n, loss in REFERENCE_FREE.items() if key in loss.keys)
        named = quote(LOSS, _types(recipe))
        return f"remove it: it has no effect beside {named}, only with {users}"

    return Rule(key, applies, remedy)


def check_beta(recipe: Recipe) -> None:
    """Refuses a β beside a loss that has none."""
    loss = reference_free(_types(recipe))
    for key in BETA_KEYS[::-1]:  # `beta` last: it has the value of the others, too
        beta = value_at(recipe, key)
        if loss is not None and not loss.has_beta and beta is not None:
            remedy = f"remove it: {quote(LOSS, _types(recipe))} has no β"
            refuse(key, beta, remedy)


LOSS_RULES: tuple[Callable[[Recipe], None], ...] = (
    Rule(
        LOSS,
        _moves_beta,
        f"set `{CONTROL}: fixed` beside it: without a reference, nothing says how β "
        "should move",
    ),
    *map(_without_reference, OF_A_REFERENCE),
    Rule(
        "metric_for_best_model",
        lambda recipe: _is_kl(recipe) and reference_free(_types(recipe)),
        lambda recipe: (
            f"name another: {quote(LOSS, _types(recipe))} has no reference, and no KL"
        ),
    ),
    *map(_unused_term, TERM_KEYS),
    check_beta,
)
