"""The head alone: hidden states of policy and reference to a loss and back.

    python benchmarks/head.py            # shapes for this machine
    python benchmarks/head.py --write    # and into RESULTS.md
    python benchmarks/head.py --memory   # only the memory of the largest shape, bf16

Needs torch, and triton on a GPU; nothing else. Side by side, per shape, with the head
frozen (LoRA) and trained (full fine-tuning):

    released   the released formula: four full-vocabulary logit tensors, their
               log-softmaxes, ε-DPO
    plain DPO  TRL 1.9's way: two full-vocabulary logit tensors, no ε
    ours       `token_stats` with ε, in PyTorch and, on a GPU, in Triton
    ours, ε off
    products   only the matrix products that are needed: two forward, the gradient of
               the hidden states and, where the head trains, that of the weight; one
               more where the logits are too many to be kept (`kept_probs.KEPT_BYTES`)
    ours, before   with `--before FOLDER`: the op of another checkout

Every contender runs `--repeats` times in turn. Times are medians of ratios to
`products` of the same turn; memory is the peak beyond inputs, in ratio to `released`.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from measure import append_results, environment, peak_extra_bytes

from axolotl_edpo.ops.kept_probs import KEPT_BYTES
from axolotl_edpo.ops.lm_head import Head
from axolotl_edpo.ops.token_stats import token_stats

EPSILON = 0.01
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Shape:
    """N tokens, H hidden, V vocabulary."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"N {self.tokens}, H {self.hidden}, V {self.vocab}"


GPU_SHAPES = [Shape(2048, 1024, 32000), Shape(8192, 4096, 128256)]
CPU_SHAPES = [Shape(2048, 512, 32000), Shape(1024, 256, 128256)]


class Case:
    """Inputs of one shape, and the contenders as methods."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        trained: bool,
        before: ModuleType | None = None,
    ):
        g = torch.Generator().manual_seed(0)

        def draw(rows: int, scale: float) -> torch.Tensor:
            values = torch.randn(rows, shape.hidden, generator=g) * scale
            return values.to("cuda" if ON_GPU else "cpu", dtype)

        self.trained, self.before = trained, before
        self.hidden = draw(shape.tokens, 1.0).requires_grad_()
        self.reference = (self.hidden + draw(shape.tokens, 0.02)).detach()
        self.weight = draw(shape.vocab, shape.hidden**-0.5).requires_grad_(trained)
        self.frozen = self.weight.detach()  # the reference's
        self.y = torch.randint(shape.vocab, (shape.tokens,), generator=g)
        self.y = self.y.to(self.hidden.device)
        self.buffer = self.hidden.new_empty(0)  # of the products

    def contenders(self) -> dict[str, Callable[[], object]]:
        """Name and one forward and backward of each."""
        ours = {"ours, PyTorch": ("eager", EPSILON)}
        if ON_GPU:
            ours["ours, Triton"] = ("triton", EPSILON)
        ours["ours, ε off"] = ("auto", None)
        runs = {name: self._ours(*how) for name, how in ours.items()}
        if self.before is not None:
            runs["ours, before"] = self._ours(
                "auto", EPSILON, self.before.token_stats, self.before.Head
            )
        others = {"released": self.released, "plain DPO": self.plain}
        return {"products": self.products, **others, **runs}

    def _ours(
        self,
        backend,
        epsilon: float | None,
        op: Callable = token_stats,
        head: Callable = Head,
    ) -> Callable[[], object]:
        def run() -> None:
            heads = head(self.weight), head(self.frozen)
            stats = op(
                self.hidden, self.reference, *heads, self.y, epsilon, backend=backend
            )
            self._backward(stats.policy_logp - stats.reference_logp)

        return run

    def released(self) -> None:
        """log-softmax of policy, reference and both perturbed policies, in float32."""
        policy = F.linear(self.hidden, self.weight).float()
        with torch.no_grad():
            reference = F.linear(self.reference, self.frozen).float()
        logps = [
            logits.log_softmax(-1).gather(1, self.y[:, None])[:, 0]
            for logits in (
                policy,
                reference,
                (1 + EPSILON) * policy - EPSILON * reference,
                (1 - EPSILON) * policy + EPSILON * reference,
            )
        ]
        self._backward(logps[0] - logps[1])

    def plain(self) -> None:
        """TRL's selective_log_softmax: logit minus logsumexp, row by row in 16 bit."""
        policy = F.linear(self.hidden, self.weight)
        with torch.no_grad():
            reference = F.linear(self.reference, self.frozen)
        self._backward(self._selective(policy) - self._selective(reference))

    def _selective(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.dtype == torch.float32:
            lse = torch.stack([row.logsumexp(-1) for row in logits])
            return logits.gather(1, self.y[:, None])[:, 0] - lse
        rows = zip(logits, self.y, strict=True)
        return torch.stack([row.log_softmax(-1)[y] for row, y in rows])

    @torch.no_grad()
    def products(self) -> None:
        """Into one buffer that is kept, so that memory is not what is timed."""
        if not len(self.buffer):
            self.buffer = self.hidden.new_zeros(len(self.y), len(self.weight))
        again = self.trained and self.buffer.nbytes > KEPT_BYTES
        for operand in (self.hidden, self.reference, *[self.hidden] * again):
            torch.mm(operand, self.weight.T, out=self.buffer)
        torch.mm(self.buffer, self.weight)  # hidden gradient
        if self.trained:
            torch.mm(self.buffer.T, self.hidden)  # weight gradient

    def extra_bytes(self, run: Callable[[], object]) -> int:
        """Peak memory of a run beyond inputs and gradients."""
        self.hidden.grad = self.weight.grad = None
        gradients = self.hidden.nbytes + (self.weight.nbytes if self.trained else 0)
        return max(0, peak_extra_bytes(run) - gradients)

    def _backward(self, log_ratio: torch.Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        (0.1 * log_ratio).sum().backward()


def measure(case: Case, repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Per contender: seconds of each turn, and peak bytes beyond the gradients."""
    contenders = case.contenders()
    case.products()  # makes its buffer
    times: dict[str, list[float]] = {name: [] for name in contenders}
    # the first run also warms up
    peaks = {name: case.extra_bytes(run) for name, run in contenders.items()}
    for _ in range(repeats):
        for name, run in contenders.items():
            times[name].append(_seconds(run))
    return times, peaks


def ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    """Median over the turns of one contender's time relative to another's."""
    pairs = zip(times[name], times[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _seconds(run: Callable[[], object]) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def op_of(checkout: Path) -> ModuleType:
    """The op's module in another checkout, beside that of this one."""
    folder = checkout / "axolotl_edpo"
    spec: Any = importlib.util.spec_from_file_location(
        "before", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["before"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    # a checkout from before the package had folders has it under its former name
    name = "ops.token_stats" if (folder / "ops").is_dir() else "logprobs"
    return importlib.import_module(f"before.{name}")


def table(
    shape: Shape,
    dtype: torch.dtype,
    trained: bool,
    repeats: int,
    before: ModuleType | None = None,
) -> str:
    """A markdown table of one case; absolute times on a GPU only."""
    times, peaks = measure(Case(shape, dtype, trained, before), repeats)
    kind = "trained" if trained else "frozen"
    lines = [
        f"### {shape}, {str(dtype).removeprefix('torch.')}, head {kind}",
        "",
        "| | time / products | time / released | extra memory | / released |"
        + (" ms |" if ON_GPU else ""),
        "|---|---|---|---|---|" + ("---|" if ON_GPU else ""),
    ]
    for name, seconds in times.items():
        lines.append(
            f"| {name} | {ratio(times, name, 'products'):.2f} "
            f"| {ratio(times, name, 'released'):.2f} | {peaks[name] / 2**20:.0f} MiB "
            f"| {peaks[name] / peaks['released']:.3f} |"
            + (f" {statistics.median(seconds) * 1e3:.1f} |" if ON_GPU else "")
        )
    best = "ours, Triton" if ON_GPU else "ours, PyTorch"
    part = ratio(times, best, "ours, ε off") - 1
    lines += ["", f"ε's part: {part:+.1%} of the time without it."]
    if before is not None:
        lines[-1] += f" Time / before: {ratio(times, best, 'ours, before'):.2f}."
    return "\n".join(lines)


def memory() -> str:
    """The peak of `token_stats` beyond inputs and gradients at the largest shape."""
    lines = ["| head | extra memory |", "|---|---|"]
    for trained in (False, True):
        case = Case(GPU_SHAPES[-1], torch.bfloat16, trained)
        run = case.contenders()["ours, Triton" if ON_GPU else "ours, PyTorch"]
        peak = case.extra_bytes(run) / 2**20
        lines.append(f"| {'trained' if trained else 'frozen'} | {peak:.0f} MiB |")
        print(lines[-1], flush=True)
    return "\n".join([f"### {GPU_SHAPES[-1]}, bfloat16", "", *lines])


def tables(options: argparse.Namespace) -> Iterator[str]:
    """The tables of every shape, with the head frozen and trained."""
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    before = op_of(options.before) if options.before else None
    for shape in options.shape or (GPU_SHAPES if ON_GPU else CPU_SHAPES):
        for trained in (False, True):
            yield table(shape, dtype, trained, options.repeats, before)


def main() -> None:
    """Measures, prints and, if asked, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument(
        "--shape",
        type=lambda text: Shape(*map(int, text.split(","))),
        action="append",
        help="N,H,V; may be repeated",
    )
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--memory", action="store_true", help="only that")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = [environment("torch", *(["triton"] if ON_GPU else []))]
    for part in [memory()] if options.memory else tables(options):
        parts.append(part)
        print("\n" + part, flush=True)
    if options.write:
        kind = "Head, memory" if options.memory else "Head"
        append_results(f"{kind}, {'GPU' if ON_GPU else 'CPU'}", "\n\n".join(parts))


if __name__ == "__main__":
    main()
