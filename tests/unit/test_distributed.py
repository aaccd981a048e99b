"""distributed.py: sums and rows of ranks, on one process and on two over gloo."""

import json

import pytest
import torch
from accelerate import Accelerator
from helpers import processes, ranks

from axolotl_edpo.distributed import gather_rows, sum_over_ranks, within_modules_forward

# Rows of rank 0 and of rank 1: both have some, one has none, none has any.
CASES = [([1, 2, 3], [4]), ([], [5, 6]), ([7], []), ([], [])]


def test_one_process_keeps_its_rows_and_sums_to_itself():
    accelerator = Accelerator(cpu=True)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows, first = gather_rows(accelerator, values)
    assert torch.equal(rows, values) and first == 0
    rows, first = gather_rows(accelerator, values[:0])
    assert rows.shape == (0, 2) and first == 0
    assert torch.equal(sum_over_ranks(accelerator, values), values)


def collect(rank: int, port: int, folder) -> None:
    """Writes what a rank gets of the others."""
    ranks.become(rank, 2, port)
    accelerator = Accelerator(cpu=True)
    gathered = []
    for case in CASES:
        for values in (torch.tensor(case[rank]).long(), torch.tensor(case[rank]) > 4):
            rows, first = gather_rows(accelerator, values)
            gathered.append([rows.tolist(), first])
    wide, _ = gather_rows(accelerator, torch.full((rank + 1, 2), rank * 1.5))
    total = sum_over_ranks(accelerator, torch.tensor([rank + 1, 10]))
    result = {"gathered": gathered, "wide": wide.tolist(), "total": total.tolist()}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def test_two_ranks_get_the_rows_of_both_in_their_order(tmp_path):
    processes.run(collect, processes.free_port(), tmp_path, count=2)
    for rank, result in enumerate(ranks.results(tmp_path)):
        expected = []
        for case in CASES:
            rows, first = sum(case, []), rank * len(case[0])
            expected += [[rows, first], [[row > 4 for row in rows], first]]
        assert result["gathered"] == expected
        assert result["wide"] == [[0.0, 0.0], [1.5, 1.5], [1.5, 1.5]]
        assert result["total"] == [3, 20]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_function_runs_inside_the_forward_of_every_module(count):
    entered: list[int] = []
    modules = [torch.nn.Linear(2, 2) for _ in range(count)]
    for number, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, n=number: entered.append(n))
        module.register_forward_hook(lambda *_, n=number: entered.remove(n))

    def double(hidden: torch.Tensor) -> torch.Tensor:
        assert entered == list(range(count))
        return 2 * hidden

    out = within_modules_forward(modules, double, torch.ones(3))
    assert out.tolist() == [2.0, 2.0, 2.0] and not entered
