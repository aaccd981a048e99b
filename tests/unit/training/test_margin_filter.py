"""margin_filter.py with tensors, on two ranks over gloo."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers import processes, ranks

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.losses.beta_controller import ControllerSettings, make_controller
from axolotl_edpo.losses.preference import PreferenceLoss
from axolotl_edpo.models.completion_forward import CompletionForward
from axolotl_edpo.ops.token_stats import TokenStats
from axolotl_edpo.reference.provider import AdapterReference
from axolotl_edpo.training.finite_checks import FiniteCheck
from axolotl_edpo.training.margin_filter import MarginFilter
from axolotl_edpo.training.scoring import PairScorer

# Margins of the pairs of rank 0 and of rank 1. Those of 1000 are left out: they are so
# far from the average that no noise brings them back.
MARGINS = [[0.0, 1000.0], [1000.0, 1000.0, 0.0, 0.0]]


def weigh(rank: int, port: int, folder: Path) -> None:
    """Writes the weights of the pairs of a rank, half of which are kept."""
    ranks.become(rank, 2, port)
    accelerator = Accelerator(cpu=True)
    settings = ControllerSettings(0.1, control="batch_margin", margin_keep=0.5)
    controller = make_controller(settings)
    controller.average, controller.deviation = 0.0, 1.0
    forward, loss = CompletionForward(accelerator), PreferenceLoss()
    reference = AdapterReference(forward)
    scorer = PairScorer(forward, reference, None, sum_sq_probs=False, router_loss=False)
    finite = FiniteCheck(folder)
    margin_filter = MarginFilter(controller, scorer, loss, accelerator, finite, seed=7)
    margins = torch.tensor(MARGINS[rank])
    pairs = [
        {"prompt_ids": [1], "chosen_ids": [number], "rejected_ids": [rank]}
        for number in range(len(margins))
    ]
    rest = torch.zeros(2 * len(margins))
    logp = torch.cat([margins, torch.zeros_like(margins)])
    stats = TokenStats(logp, *[rest] * 8)
    weights = margin_filter.weights(PairCollator(pad_token_id=0)(pairs), stats, 0)
    (folder / f"rank{rank}.json").write_text(json.dumps(weights.tolist()))


def test_every_rank_gets_the_weights_of_its_own_pairs_with_a_mean_of_1(tmp_path):
    processes.run(weigh, processes.free_port(), tmp_path, count=2)
    assert ranks.results(tmp_path) == [[2.0, 0.0], [0.0, 0.0, 2.0, 2.0]]
