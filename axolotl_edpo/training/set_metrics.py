"""`SetMetrics`: the metrics of each set of `test_datasets:`, beside those of all pairs.

One evaluation runs over the pairs of all sets. Each value is added to the mean over all
pairs, and also to the mean of its pair's set. So no pair runs twice.
"""

from collections.abc import Callable

import torch

from ..background import on_device
from ..data.completions import sum_per_sequence
from ..data.evaluation_sets import SET
from ..data.layout import Batch
from ..ops.token_stats import TokenStats
from ..reference.kept import KL
from .pair_outcomes import AnswerStats, MeanOverStep, PairOutcomes

# Sums over the tokens of a pair, of which the metrics per token are made.
TOKENS, CHOSEN_TOKENS = "sum/tokens", "sum/chosen_tokens"
KL_SUM, SFT_SUM = "sum/kl", "sum/sft"


class SetMetrics:
    """Adds the values of evaluated pairs to the means of their sets.

    Args:
        names: Name of each set, by its number; empty: there are no sets.
        perturbed: Whether ε-DPO computes a step s for each pair.
        mean: Makes the loss of a set of its means.
    """

    def __init__(self, names: tuple[str, ...], perturbed: bool, mean: MeanOverStep):
        self._names, self._perturbed, self._mean = names, perturbed, mean

    def add(
        self,
        add: Callable[[str, torch.Tensor], None],
        batch: Batch,
        stats: TokenStats,
        pairs: PairOutcomes,
        router_loss: torch.Tensor | None,
    ) -> None:
        """Adds a micro-batch to the means of every set; does not wait for the device.

        A set without a pair in it is added too: all ranks sum the same names.

        Args:
            add: Adds values of equal weight to a named mean.
            batch: The micro-batch.
            stats: Statistics of its scored tokens.
            pairs: Outcomes of its pairs.
            router_loss: Router loss of a mixture of experts, shape (); or None.
        """
        if not self._names:
            return
        values = self._values(stats, batch["lengths"], pairs)
        if router_loss is not None:
            values["aux_loss"] = router_loss.expand(len(pairs.steps))
        table = torch.stack([value.detach().float() for value in values.values()])
        sets = [pair.get(SET) for pair in batch["examples"].pairs]
        for number in range(len(self._names)):
            of_set = [place for place, other in enumerate(sets) if other == number]
            places = on_device(torch.tensor(of_set, dtype=torch.int64), table.device)
            for key, row in zip(values, table[:, places], strict=True):
                add(f"set{number}/{key}", row)

    def _values(
        self, stats: TokenStats, lengths: torch.Tensor, pairs: PairOutcomes
    ) -> dict[str, torch.Tensor]:
        """Name -> values of shape (pairs,)."""
        moved = {
            "kl/avg_steps": pairs.steps,
            "kl/p_epsilon_steps": pairs.steps == 1,
            "kl/n_epsilon_steps": pairs.steps == -1,
        }
        kl = {}
        if not isinstance(stats, AnswerStats):
            chosen_kl, rejected_kl = sum_per_sequence(stats.kl, lengths).chunk(2)
            kl = {KL_SUM: chosen_kl + rejected_kl}
        chosen, rejected = lengths.chunk(2)
        return {
            **(moved if self._perturbed else {}),
            **kl,
            "rewards/chosen": pairs.chosen_rewards,
            "rewards/rejected": pairs.rejected_rewards,
            "rewards/accuracies": pairs.margins > 0,
            "rewards/margins": pairs.margins,
            "loss": pairs.losses,
            SFT_SUM: pairs.sft,
            TOKENS: chosen + rejected,
            CHOSEN_TOKENS: chosen,
        }

    def finish(self, means: dict[str, float]) -> None:
        """Makes the metrics per token and the loss of each set, in place.

        Args:
            means: Name -> mean over pairs. A set of which no pair was evaluated, as
                where `axolotl evaluate` runs over the training set, is removed.
        """
        for number, name in enumerate(self._names):
            prefix = f"set{number}/"
            found = [key for key in means if key.startswith(prefix)]
            of_set = {key.removeprefix(prefix): means.pop(key) for key in found}
            tokens, chosen = of_set.pop(TOKENS), of_set.pop(CHOSEN_TOKENS)
            sft, kl = of_set.pop(SFT_SUM), of_set.pop(KL_SUM, None)
            if tokens:
                sft = sft / chosen if chosen else 0.0
                aux_loss = of_set.get("aux_loss", 0.0)
                of_set["loss"] = self._mean.of_whole_set(of_set["loss"], sft, aux_loss)
                if kl is not None:
                    of_set[KL] = kl / tokens
                means |= {f"{name}_{key}": value for key, value in of_set.items()}
