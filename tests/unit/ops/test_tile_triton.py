"""tile_triton.py: it compiles for real GPUs, and runs on one where there is one.

What the kernels compute is tested in test_token_stats.py, where they are interpreted.
"""

import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from helpers.gpu import needs_named_gpu
from helpers.tiers import first
from helpers.token_stats import assert_as_exact_as_pytorch, gradients, inputs, naive
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from axolotl_edpo.ops import kept_probs, tile_triton
from axolotl_edpo.ops.lm_head import Head
from axolotl_edpo.ops.token_stats import token_stats

COMPILE = """
import re
import subprocess
import sys
import tempfile
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from axolotl_edpo.ops import tile_triton
from axolotl_edpo.ops.lm_head import Head

class Absent:  # what Triton asks of a GPU before it compiles
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

READER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

def stack_bytes(cubin):  # where ptxas puts values that have no register
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [READER, "--dump-resource-usage", file.name]
        read = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(re.search(r"STACK:(\\d+)", read.stdout)[1])

def compiles(kernel, grid):
    def launch(*arguments, **options):
        built = kernel.warmup(*arguments, grid=grid, **options)
        cubin, fused = built.asm["cubin"], int(built.metadata.enable_fp_fusion)
        print(len(cubin), stack_bytes(cubin), fused)

    return launch

driver.set_active(Absent())
JITFunction.__getitem__ = compiles
weight, targets = torch.empty(1, 1), torch.zeros(3, dtype=torch.int64)
for flags in (False, True):
    head = Head(weight, scale=0.5, cap=5.0) if flags else Head(weight)
    for block in tile_triton.TILE, 2 * tile_triton.TILE:
        space = torch.empty(2, 3, block - 1)
        numerators = tile_triton.new_numerators(space, torch.bfloat16)
        shrinks = tile_triton.add_tile(
            tile_triton.new_sums(3, "cpu"),
            space,
            targets,
            (head, head),
            epsilon=0.01 if flags else None,
            sum_sq_probs=flags,
            numerators=numerators if flags else None,
        )
    token = targets, shrinks, shrinks
    tile_triton.gradient_tile(space[0], *token, head, torch.bfloat16)
tile_triton.rescale(space[0], shrinks)
"""


@pytest.mark.parametrize("architecture", first([90, 80]))
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(architecture, monkeypatch):
    """As its launcher says: it has registers, and fuses no product with a sum."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-c", COMPILE, str(architecture)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = [[*map(int, line.split())] for line in done.stdout.splitlines()]
    assert len(built) == 7
    sizes, spilled, fused = zip(*built, strict=True)
    assert min(sizes) > 1000
    assert not any(spilled) and not any(fused)


class Operators(TorchDispatchMode):
    """Notes every operator, and refuses tensors that are not on the GPU."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.add(operator.overloadpacket)
        kwargs = kwargs or {}
        if operator == torch.ops.aten.addmm.dtype_out:  # torch 2.11 cannot fake it
            return kwargs["out"]
        out = operator(*args, **kwargs)
        for x in tree_leaves((args, out)):
            assert not isinstance(x, torch.Tensor) or x.is_cuda, operator
        return out


@needs_named_gpu
@pytest.mark.parametrize("trained", [None, "kept", "again"])
def test_the_host_never_waits_for_the_gpu(trained, monkeypatch):
    """On tensors that are on a GPU by name only: to read one is an error there."""
    for name in ("add_tile_kernel", "gradient_tile_kernel", "rescale_kernel"):
        monkeypatch.setattr(
            tile_triton, name, defaultdict(lambda: lambda *_, **__: None)
        )
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(kept_probs, "KEPT_BYTES", 2**29 if trained == "kept" else 0)
    with FakeTensorMode():
        kind = dict(device="cuda", dtype=torch.bfloat16)
        h = torch.empty(5000, 64, **kind, requires_grad=True)
        w = torch.empty(9001, 64, **kind, requires_grad=trained is not None)
        y = torch.empty(5000, device="cuda", dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            y[0].item()
        with Operators() as operators:
            stats = token_stats(h, h.detach(), Head(w), Head(w.detach()), y, 0.01)
            gradients = stats.policy_logp.grad_fn.apply(*stats)
    assert [g.shape for g in gradients if g is not None] == [
        x.shape for x in (h, w) if x.requires_grad
    ]
    aten = torch.ops.aten
    assert aten.addmm in operators.seen
    assert (aten.scatter_ in operators.seen) == (trained == "kept")


def test_op_and_equations_need_torch_alone():
    """So that they can be used and measured where nothing else is installed."""
    loaded = "import sys, axolotl_edpo.ops, axolotl_edpo.losses.edpo"
    done = subprocess.run(
        [sys.executable, "-c", f"{loaded}; print(*sys.modules)"],
        capture_output=True,
        text=True,
    )
    modules = set(done.stdout.split())
    parts = ("walk", "operands", "gradients", "kept_probs", "lm_head", "tile_torch")
    assert {f"axolotl_edpo.ops.{part}" for part in parts} <= modules
    others = {"axolotl", "bitsandbytes", "peft", "pydantic", "transformers", "trl"}
    assert not modules & others


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_on_a_gpu_values_and_gradients_are_as_exact_as_pytorch(dtype, trained):
    """Whole tiles and pieces of them, products of 16-bit operands on tensor cores."""
    sizes = dict(tokens=4500, hidden=256, vocab=9001, size=0.3)
    h, ref, head, y = inputs(**sizes, dtype=dtype, device="cuda")
    leaves = [h, head.weight] if trained else [h]
    for leaf in leaves:
        leaf.requires_grad_()
    ours = token_stats(h, ref, head, head, y, 0.01, sum_sq_probs=True)
    plain = naive(h, ref, head, y, 0.01, dtype)
    exact = naive(h, ref, head, y, 0.01)
    logit_size = 10 + head.logits(h.detach()).abs().max()
    assert_as_exact_as_pytorch(ours, plain, exact, logit_size)
    got = (gradients(stats.policy_logp, leaves) for stats in (ours, plain, exact))
    for a, b, c in zip(*got, strict=True):
        error, allowed = (a - c).abs().max(), (b - c).abs().max()
        # the largest of a million rounding errors; on an H100 it differed by 9 %
        assert error <= 1.25 * allowed + torch.finfo(dtype).eps * c.abs().max()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("scale", [1.0, 1 / 6, 0.8333])
def test_on_a_gpu_equal_policies_give_exactly_zero(scale):
    """Nothing is fused with the difference of logits; the interpreter never fuses."""
    kind = dict(tokens=500, hidden=64, vocab=5000, device="cuda", scale=scale)
    h, _, head, y = inputs(**kind)
    stats = token_stats(h, h.clone(), head, head, y, 0.01)
    for values in (stats.plus, stats.minus, stats.kl):
        assert not values.any()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("trained", [False, True])
def test_on_a_gpu_memory_is_bounded_by_the_tile(trained):
    tokens, hidden, vocab = 8192, 4096, 128256
    kind = dict(device="cuda", dtype=torch.bfloat16)
    h, ref = (torch.randn(tokens, hidden, **kind) for _ in range(2))
    weight = torch.randn(vocab, hidden, **kind) / 64
    y = torch.randint(vocab, (tokens,), device="cuda")
    h.requires_grad_()
    weight.requires_grad_(trained)
    head = Head(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_stats(h, ref, head, head, y, 0.01).policy_logp.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = sum(t.nbytes for t in (h, weight) if t.requires_grad)
    assert extra - gradients <= 512 * 2**20
