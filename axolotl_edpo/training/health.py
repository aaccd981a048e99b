"""Names a run that overfits or collapses, from the numbers that it logs.

    name                 what holds in each of the last WINDOW logs of training
    overfitting          the loss is near 0, and nearly all pairs are told apart
    exploding margins    the mean reward margin is far from 0, in either direction
    collapse             both rewards are below 0, and KL per token is large
    edpo_max_kl          (in the last log alone) KL per token is above the user's bound

The first three get one line each per run. The last one stops the run. Where the loss
has no reference, rewards do not start at 0, so of the first three only overfitting is
looked for. Nothing is computed for it: a log holds means over all ranks, so all ranks
see the same. What was found is kept in `log_history`, in the entry of that log. So it
is in every later checkpoint, a resumed run does not repeat it, and `axolotl
edpo-report` marks it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..run_files import WARNINGS

Log = Mapping[str, Any]

KL = "kl/policy_ref"
MAX_KL = "edpo_max_kl"
# A condition must hold in this many logs, so that one unusual step is not enough.
WINDOW = 5
# Bounds between healthy and collapsed runs that were measured: see docs/method.md.
LOSS, ACCURACY = 0.02, 0.99
MARGIN = 20.0  # rewards: the pull of a pair, σ(-margin), is then 2e-9
COLLAPSED_KL = 4.0  # nats per token


@dataclass(frozen=True)
class Condition:
    """A kind of failure.

    Attributes:
        name: Its name, in the line and in the report.
        holds: Whether a log of training shows it.
        text: What it means, and what to do.
        compares: Whether it takes rewards for distances from a reference.
    """

    name: str
    holds: Callable[[Log], bool]
    text: str
    compares: bool = True


def _overfits(log: Log) -> bool:
    return log["loss"] < LOSS and log["rewards/accuracies"] > ACCURACY


def _margins_explode(log: Log) -> bool:
    return abs(log["rewards/margins"]) > MARGIN


def _collapses(log: Log) -> bool:
    # rewards start at 0
    both_fell = log["rewards/chosen"] < 0 and log["rewards/rejected"] < 0
    # not logged where two numbers are kept of the reference
    return both_fell and log.get(KL, 0.0) > COLLAPSED_KL


CONDITIONS = (
    Condition(
        "overfitting",
        _overfits,
        f"the loss is below {LOSS} and more than {ACCURACY:.0%} of the training pairs "
        "are told apart: they teach little more. Compare "
        "`eval_rewards/accuracies`; train fewer `num_epochs`, lower `learning_rate` or "
        "raise `beta`",
        compares=False,
    ),
    Condition(
        "exploding margins",
        _margins_explode,
        f"the mean reward margin is beyond ±{MARGIN:g}, where the loss hardly pulls or "
        "pulls the wrong way. Lower `learning_rate`, or train fewer `num_epochs`",
    ),
    Condition(
        "collapse",
        _collapses,
        "chosen and rejected both lose reward and KL(π‖π_ref) is above "
        f"{COLLAPSED_KL:g} nats per token: the policy loses its answers. Take an "
        "earlier checkpoint, lower `learning_rate` or raise `beta`; "
        f"`{MAX_KL}` stops a run at a bound",
    ),
)


class HealthCheck:
    """Finds conditions in the logs of a run, each once.

    Args:
        max_kl: `edpo_max_kl`: most KL per token of a log, nats; None: no bound.
        has_reference: Whether the loss has a reference.
    """

    def __init__(self, max_kl: float | None = None, has_reference: bool = True):
        self._max_kl = max_kl
        self._conditions = [c for c in CONDITIONS if has_reference or not c.compares]
        self._named: set[str] = set()

    def begin(self, history: Iterable[Log]) -> None:
        """Starts a run: what a resumed checkpoint has named is not named again."""
        self._named = {name for log in history for name in log.get(WARNINGS, ())}

    def find(self, history: Sequence[Log]) -> dict[str, str]:
        """Names what the newest log shows for the first time.

        Args:
            history: `log_history` of transformers, the newest log last.

        Returns:
            Name -> line for the user. Empty if the newest log is not one of training.
        """
        if not _is_training(history[-1]):
            return {}
        recent = [*islice(filter(_is_training, reversed(history)), WINDOW)]
        found = {
            condition.name: f"in each of the last {WINDOW} logs {condition.text}"
            for condition in self._conditions
            if condition.name not in self._named
            and len(recent) == WINDOW
            and all(map(condition.holds, recent))
        }
        self._named |= {*found}
        if self.stops(history[-1]):
            found[MAX_KL] = self._stopped(history[-1])
        step = history[-1]["step"]
        return {name: f"Step {step}, {name}: {text}." for name, text in found.items()}

    def stops(self, log: Log) -> bool:
        """Whether a log asks to stop: one of training with a KL above the bound."""
        if self._max_kl is None or not _is_training(log):
            return False
        return log[KL] > self._max_kl

    def _stopped(self, log: Log) -> str:
        return (
            f"KL(π‖π_ref) is {log[KL]:.4g} nats per token, above "
            f"`{MAX_KL}: {self._max_kl:g}`: training stops after a checkpoint. Lower "
            "`learning_rate` or raise `beta`; or raise the bound and resume"
        )


def _is_training(log: Log) -> bool:
    return "loss" in log and "rewards/margins" in log
