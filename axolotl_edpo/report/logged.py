"""The metrics that a run logs: name, label, and how to read the curve."""

from dataclasses import dataclass

# The prefix of metrics that were logged in evaluation.
EVAL = "eval_"


@dataclass(frozen=True)
class Metric:
    """A logged metric.

    Attributes:
        name: Its name in the log.
        label: Its name in the report.
        note: How to read its curve.
    """

    name: str
    label: str
    note: str = ""


BETA = Metric(
    "kl/beta",
    "KL penalty β",
    "The β that each step used. Falling: the policy is being let go from its "
    "reference. Rising: it is being held closer.",
)
SMALLER = Metric("kl/p_epsilon_steps", "Share of pairs for a smaller β, s = +1")
LARGER = Metric("kl/n_epsilon_steps", "Share of pairs for a larger β, s = −1")
NET = Metric(
    "kl/avg_steps",
    "Share for a smaller β minus share for a larger one",
    "Above 0: more pairs ask for a smaller β than for a larger one, so β falls.",
)
KL = Metric(
    "kl/policy_ref",
    "KL(π‖π_ref) per token, nats",
    "How far the policy has moved from its reference, on the answers' tokens. It is "
    "what β is there to bound.",
)
AVERAGE = Metric(
    "kl/margin_average",
    "Average margin M₀, nats",
    "What the margins of a step are compared with: above it, β rises.",
)
LOSS = Metric("loss", "Loss", "At ln 2 = 0.693 chosen and rejected are not told apart.")
MARGIN = Metric(
    "rewards/margins",
    "Reward margin",
    "Implicit reward of chosen minus that of rejected. It contains β: where β "
    "falls, the same policy has a smaller margin.",
)
ACCURACY = Metric(
    "rewards/accuracies",
    "Reward accuracy",
    "Share of pairs with a margin above 0. It is 0, not one half, while policy and "
    "reference are equal. Training rising and evaluation not: the policy learns its "
    "pairs by heart.",
)
CHOSEN = Metric("rewards/chosen", "Reward of chosen")
REJECTED = Metric("rewards/rejected", "Reward of rejected")
RATE = Metric("learning_rate", "Learning rate", "The schedule, as it was applied.")

METRICS = (
    BETA,
    AVERAGE,
    SMALLER,
    LARGER,
    NET,
    KL,
    LOSS,
    MARGIN,
    ACCURACY,
    CHOSEN,
    REJECTED,
    RATE,
)
# Metrics that are exact, not means over pairs. Their curves are not smoothed.
EXACT = (BETA, RATE)
# What a run was warned of -> the metrics whose curves show it.
SHOWN_BY = {
    "overfitting": (LOSS, ACCURACY),
    "exploding margins": (MARGIN,),
    "collapse": (KL, MARGIN),
    "edpo_max_kl": (KL,),
}
