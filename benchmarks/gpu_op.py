"""Sections of `gpu.py` about the head, the attention and the machine.

None of them trains. They need torch, and transformers for the attention.
"""

import importlib.util
import inspect
import re
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_child import Notes, end
from head import EPSILON, ON_GPU, Shape
from measure import peak_extra_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from axolotl_edpo.ops import kept_probs, tile_triton
from axolotl_edpo.ops.lm_head import Head
from axolotl_edpo.ops.token_stats import TokenStats, token_stats

TESTS = Path(__file__).resolve().parent.parent / "tests"
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16
MIB = 2**20
LARGE = Shape(4096, 4096, 128256) if ON_GPU else Shape(96, 64, 1000)
# of Llama-3-8B at two lengths, Llama-3.2-1B and Qwen2.5-0.5B
SHAPES = [
    Shape(8192, 4096, 128256),
    Shape(2048, 4096, 128256),
    Shape(2048, 2048, 128256),
    Shape(4096, 896, 151936),
]
EXACT_TOKENS = 256  # whose rows of logits are held in float64
VALUES = ("policy_logp", "reference_logp", "plus", "minus", "kl")
ODD_TOKENS = (1, 2, 3, 15, 16, 17, 100, 999, 4095, 4096, 4097, 5000, 8192)


class Inputs(NamedTuple):
    """Of the head: two hidden states per token, one head, targets."""

    hidden: torch.Tensor
    reference: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor


def draw(shape: Shape, distance: float = 0.02) -> Inputs:
    """Random inputs whose hidden states are this far apart, relative to their size."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        size = rows, shape.hidden
        return torch.randn(size, generator=generator, device=DEVICE)

    hidden = normal(shape.tokens)
    reference = (hidden + distance * normal(shape.tokens)).to(DTYPE)
    weight = (normal(shape.vocab) * shape.hidden**-0.5).to(DTYPE)
    size = (shape.tokens,)
    y = torch.randint(shape.vocab, size, generator=generator, device=DEVICE)
    return Inputs(hidden.to(DTYPE).requires_grad_(), reference, weight, y)


def milliseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a run, on the GPU's own clock where there is one."""
    run()  # compiles
    times = []
    for _ in range(repeats if ON_GPU else 1):
        if not ON_GPU:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
            continue
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


# --- probe -----------------------------------------------------------------------


def probe(note: Notes) -> None:
    """Speed of a copy, of a large product, and of the three products of a tile."""
    size, side = (2**30, 8192) if ON_GPU else (2**20, 256)
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        note("multiprocessors", properties.multi_processor_count)
        note("memory, GiB", properties.total_memory / 2**30)
        note("CUDA", torch.version.cuda)
        note("cuDNN", torch.backends.cudnn.version())
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = milliseconds(lambda: target.copy_(source), 20) / 1e3
    note("copy, TB/s read and written", 2 * size / seconds / 1e12)
    a = torch.randn(side, side, device=DEVICE).to(DTYPE)
    note(f"product {side} cubed, TFLOP/s", tflops(side, lambda: a @ a.T))
    if not ON_GPU:
        return
    tile = a[:4096, :4096].contiguous()
    sums = torch.zeros(4096, 4096, device=DEVICE)
    wide = {"out_dtype": torch.float32, "out": sums}
    products = {
        "bfloat16 out": lambda: torch.mm(tile, tile.T),
        "float32 out": lambda: torch.mm(tile, tile.T, **wide),
        "added to float32": lambda: torch.addmm(sums, tile, tile, **wide),
    }
    for name, run in products.items():
        note(f"product of a tile, 4096 cubed, {name}, TFLOP/s", tflops(4096, run))


def tflops(side: int, run: Callable[[], object]) -> float:
    """Of a product of two square matrices."""
    return 2 * side**3 / milliseconds(run, 20) / 1e9


# --- numbers ---------------------------------------------------------------------


def numbers(note: Notes) -> None:
    """Against float64: values, steps, gradients; equal models; drifting ones."""
    note("shapes", f"{LARGE}, bfloat16; errors relative to the largest value")
    for distance in (0.002, 0.02, 0.2):
        inputs = draw(LARGE, distance)
        head = Head(inputs.weight)
        note(f"distance {distance}", compared(inputs, head, exact(inputs), 0.0))
    note("equal models, not exactly 0 at (tokens, offset)", not_zero())
    for keeps, how in ((True, "kept"), (False, "formed again")):
        name = f"weight gradient of a trained head, numerators {how}, relative error"
        note(name, trained_error(keeps))
    inputs = draw(LARGE)
    expected = exact(inputs)
    for nats in (0, 3, 4, 10, 50):
        bias = torch.full((LARGE.vocab,), float(nats), device=DEVICE, dtype=DTYPE)
        drifted = Head(inputs.weight, bias=bias)
        note(f"drift of {nats} nats", compared(inputs, drifted, expected, nats))


def compared(inputs: Inputs, policy: Head, expected: dict, drift: float) -> dict:
    """Errors of the op's values, of the gradient and of the steps, and its time.

    Args:
        inputs: See `draw`.
        policy: Its head; with a bias that adds `drift` to every logit, which changes
            no probability.
        expected: Of `exact`.
        drift: In nats.
    """
    reference = Head(inputs.weight)

    def run() -> TokenStats:
        inputs.hidden.grad = None
        stats = token_stats(
            inputs.hidden, inputs.reference, policy, reference, inputs.y, EPSILON
        )
        stats.policy_logp.sum().backward()
        return stats

    stats = run()
    row: dict[str, Any] = {
        name: largest_error(getattr(stats, name), expected[name]) for name in VALUES
    }
    row["gradient"] = distance(inputs.hidden.grad, expected["gradient"])
    found = steps(stats.plus.double(), stats.minus.double())
    wanted = steps(expected["plus"], expected["minus"])
    row["equal steps"] = (found == wanted).double().mean().item()
    return {**row, "ms": milliseconds(run, 3)}


def exact(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The op's definition, from all logits in float64, a few tokens at a time."""
    weight, parts = inputs.weight.double(), []
    with torch.no_grad():
        for at in range(0, len(inputs.y), EXACT_TOKENS):
            rows = slice(at, at + EXACT_TOKENS)
            y = inputs.y[rows]
            policy = inputs.hidden[rows].double() @ weight.T
            reference = inputs.reference[rows].double() @ weight.T
            parts.append(exact_rows(policy, reference, weight, y))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def exact_rows(policy, reference, weight, y) -> dict[str, torch.Tensor]:
    """Values of tokens whose logits of shape (tokens, vocab) are given."""

    def logp(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(1, y[:, None])[:, 0]

    difference, own = policy - reference, policy.log_softmax(-1)
    p, at_y = own.exp(), logp(policy)
    return {
        "policy_logp": at_y,
        "reference_logp": logp(reference),
        "plus": logp(policy + EPSILON * difference) - at_y,
        "minus": logp(policy - EPSILON * difference) - at_y,
        "kl": (p * (own - reference.log_softmax(-1))).sum(-1),
        "gradient": weight[y] - p @ weight,
    }


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest expected value."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    return error.item()


def distance(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to that of what was expected."""
    assert found is not None
    return ((found.double() - expected).norm() / expected.norm()).item()


def steps(plus: torch.Tensor, minus: torch.Tensor, length: int = 32) -> torch.Tensor:
    """Of pairs whose answers have so many tokens: 1, 0 or -1 each."""
    pairs = len(plus) // (2 * length)

    def margins(values: torch.Tensor) -> torch.Tensor:
        answers = values[: pairs * 2 * length].view(2, pairs, length).sum(-1)
        return answers[0] - answers[1]

    plus, minus = margins(plus), margins(minus)
    return ((plus > 0) & (minus < 0)).long() - ((plus < 0) & (minus > 0)).long()


def not_zero() -> list[str]:
    """Where equal models differ: numbers of tokens, and the reference's alignment."""
    found = []
    for tokens in ODD_TOKENS if ON_GPU else (1, 17):
        inputs = draw(Shape(tokens, LARGE.hidden, LARGE.vocab))
        heads = Head(inputs.weight), Head(inputs.weight.clone())
        values = inputs.hidden.detach().flatten()
        for offset in (0, 8):  # 16 bytes
            moved = values.new_empty(len(values) + offset)[offset:].copy_(values)
            twin = moved.view_as(inputs.hidden)
            stats = token_stats(inputs.hidden, twin, *heads, inputs.y, EPSILON)
            if any(x.any() for x in (stats.plus, stats.minus, stats.kl)):
                found.append(f"({tokens}, {offset})")
    return found or ["nowhere"]


def trained_error(keeps: bool) -> float:
    """Of the head's weight gradient, where it trains: few targets of a policy sure of
    them, with both signs, as they are late in a run."""
    kept_probs.KEPT_BYTES = 2**40 if keeps else 0
    inputs = draw(LARGE)
    y = inputs.y % 50
    hidden = inputs.hidden.detach() * 0.3 + 16 * inputs.weight[y]
    hidden, weight = hidden.requires_grad_(), inputs.weight.clone().requires_grad_()
    heads = Head(weight), Head(inputs.weight)
    signs = torch.linspace(-1, 1, len(y), device=DEVICE)
    stats = token_stats(hidden, inputs.reference, *heads, y, EPSILON)
    (stats.policy_logp * signs).sum().backward()
    rows, wide = hidden.detach().double(), inputs.weight.double()
    expected = torch.zeros_like(wide)
    for at in range(0, len(rows), EXACT_TOKENS):
        part = slice(at, at + EXACT_TOKENS)
        p = (rows[part] @ wide.T).softmax(-1)
        p[torch.arange(len(p)), y[part]] -= 1
        expected -= (p * signs[part, None]).T @ rows[part]
    return distance(weight.grad, expected)


# --- tests -----------------------------------------------------------------------


def tests(note: Notes) -> None:
    """Runs them with pytest.

    Raises:
        RuntimeError: If one fails.
    """
    files = ["unit/ops/test_tile_triton.py", "unit/ops/test_token_stats.py"]
    files += ["unit/models/test_packed_attention.py"]
    chosen = [] if ON_GPU else ["-k", "exactly_zero and eager"]  # a few
    workers = ["-n", "8"] if ON_GPU and importlib.util.find_spec("xdist") else []
    report = Path("tests.xml").resolve()
    command = [sys.executable, "-m", "pytest", *files, *chosen, *workers]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        command, cwd=TESTS, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
    if not report.exists():
        end = (done.stdout + done.stderr)[-500:]
        raise RuntimeError(f"pytest ended with {done.returncode}: {end}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    note("run", len(cases) - skipped)
    note("skipped", skipped)
    note("failed", failed or "none")
    if failed or not cases:
        raise RuntimeError(f"{len(failed)} of {len(cases)} tests failed")


# --- head ------------------------------------------------------------------------


def head(note: Notes) -> None:
    """Time of the op relative to its own products, and what moves it."""
    counts = ", ".join(f"{name} {count}" for name, count in PRODUCTS.items())
    note("shapes", f"N, H, V; bfloat16; products with a head that is {counts}")
    for shape in SHAPES if ON_GPU else [LARGE]:
        inputs = draw(shape)
        for kind, count in PRODUCTS.items():
            weight = inputs.weight.clone().requires_grad_(kind != "frozen")
            products = milliseconds(products_of(inputs, count))
            for epsilon in (EPSILON, None):
                run = step_of(inputs, weight, epsilon, keeps="kept" in kind)
                spent = milliseconds(run)
                note(
                    f"{shape}, {kind}" + (", ε off" if epsilon is None else ""),
                    {
                        "ms": spent,
                        "products, ms": products,
                        "ratio": spent / products,
                        "extra MiB": extra_mib(inputs, weight, run),
                    },
                )
    sweep(note)
    kernels_of_a_step(note)


# Matrix products of the op. What a head that trains may keep decides between the last.
PRODUCTS = {"frozen": 3, "trained, kept": 4, "trained, formed again": 5}


def products_of(inputs: Inputs, count: int) -> Callable[[], None]:
    """The products that the op needs, each as one call, into one buffer."""
    hidden, weight = inputs.hidden.detach(), inputs.weight
    buffer = hidden.new_zeros(len(hidden), len(weight))

    def run() -> None:
        torch.mm(hidden, weight.T, out=buffer)
        torch.mm(inputs.reference, weight.T, out=buffer)
        torch.mm(buffer, weight)  # hidden gradient
        if count > 3:
            torch.mm(buffer.T, hidden)  # weight gradient
        if count > 4:
            torch.mm(hidden, weight.T, out=buffer)  # logits once more

    return run


def step_of(
    inputs: Inputs, weight: torch.Tensor, epsilon: float | None, keeps: bool = False
):
    """Forward and backward of the op, which keeps all numerators or none."""

    def run() -> None:
        kept_probs.KEPT_BYTES = 2**40 if keeps else 0
        inputs.hidden.grad = weight.grad = None
        heads = Head(weight), Head(inputs.weight)
        stats = token_stats(inputs.hidden, inputs.reference, *heads, inputs.y, epsilon)
        (stats.policy_logp - stats.reference_logp).sum().backward()

    return run


def extra_mib(inputs: Inputs, weight: torch.Tensor, run: Callable[[], object]) -> float:
    """Peak memory of a run beyond inputs and gradients."""
    inputs.hidden.grad = weight.grad = None
    gradients = inputs.hidden.nbytes + weight.nbytes * weight.requires_grad
    return max(0, peak_extra_bytes(run) - gradients) / MIB


def sweep(note: Notes) -> None:
    """Other sizes of chunk and tile, and other numbers of logits per thread."""
    if not ON_GPU:
        note("sweep", "needs a GPU")
        return
    inputs = draw(LARGE)
    run = step_of(inputs, inputs.weight, EPSILON)
    usual = tile_triton.CHUNK, tile_triton.TILE, tile_triton.warps
    choices = [(4096, 4096, 32), (4096, 4096, 16), (4096, 8192, 32), (2048, 4096, 32)]
    choices += [(2048, 8192, 32), (8192, 4096, 32), (8192, 8192, 32)]
    try:
        for chunk, tile, logits in choices:
            tile_triton.CHUNK, tile_triton.TILE = chunk, tile
            tile_triton.warps = lambda block, n=logits: min(
                max(block // 32 // n, 1), 32
            )
            name = f"{LARGE}, CHUNK {chunk} TILE {tile}, {logits} logits per thread"
            note(name, {"sweep, ms": milliseconds(run, 5)})
    finally:
        tile_triton.CHUNK, tile_triton.TILE, tile_triton.warps = usual


def kernels_of_a_step(note: Notes) -> None:
    """Which kernels the time goes to."""
    if not ON_GPU:
        note("kernels", "needs a GPU")
        return
    inputs = draw(LARGE)
    run = step_of(inputs, inputs.weight, EPSILON)
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda e: -e.device_time_total)
    for event in events[:10]:
        spent = {"kernel, ms": event.device_time_total / 1e3, "calls": event.count}
        note(f"{event.key[:60]}", spent)


# --- attention -------------------------------------------------------------------

WITHOUT_CUDNN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(note: Notes) -> None:
    """Forward and backward of a row with shared prompts, new lengths and known ones."""
    heads, groups, size = (32, 8, 128) if ON_GPU else (4, 2, 16)
    note(
        "shapes",
        f"{8 if ON_GPU else 2} pairs of shared prompts in one row, {heads} heads, "
        f"{groups} of keys, size {size}, bfloat16",
    )
    for name, make in contenders(heads, groups, size).items():
        try:
            note(name, times_of(make(), heads, groups, size))
        except Exception as error:  # of a kernel that is not there
            note(name, f"{type(error).__name__}: {error}")


def contenders(heads: int, groups: int, size: int) -> dict[str, Callable[[], Any]]:
    """Each makes a function of query, key, value (1, heads, length, size), segments."""
    sizes = heads, groups, size
    ways: dict[str, Callable[[], Any]] = {
        "one SDPA call per segment": lambda: sdpa_per_segment,
        "the same without cuDNN": lambda: sdpa_without_cudnn,
        "ours, `sdpa`": lambda: packed_attention("sdpa", *sizes),
    }
    if ON_GPU:
        ways["torch.nn.attention.varlen"] = lambda: torch_varlen
        flash = "flash_attention_2"
        ways[f"ours, `{flash}`"] = lambda: packed_attention(flash, *sizes)
    return ways


def times_of(attend: Callable[..., Any], heads: int, groups: int, size: int) -> dict:
    """Milliseconds with new lengths and with known ones, and the error."""
    new = [elapsed(attend, inputs_of(heads, groups, size, seed)) for seed in range(4)]
    known = inputs_of(heads, groups, size, 4)
    elapsed(attend, known)
    again = [elapsed(attend, known) for _ in range(5)]
    segments, *states = inputs_of(heads, groups, size, 5)
    out = attend(*states, segments)
    wide = [x.detach().float().requires_grad_() for x in states]
    expected = sdpa_per_segment(*wide, segments)
    gradients = torch.autograd.grad(out.float().sum(), states)
    wanted = torch.autograd.grad(expected.sum(), wide)
    return {
        "new lengths, ms": new[1:],  # the first one compiles
        "known lengths, ms": statistics.median(again),
        "error": distance(out.detach(), expected.detach().double()),
        "error of the queries' gradient": distance(gradients[0], wanted[0].double()),
    }


def inputs_of(heads: int, groups: int, size: int, seed: int) -> tuple[Any, ...]:
    """Segments of a row, and its query, key and value."""
    from axolotl_edpo.data.packing import pack

    generator = torch.Generator().manual_seed(seed)
    pairs, prompt = (8, 100) if ON_GPU else (2, 10)
    low, high = (150, 450) if ON_GPU else (5, 9)
    ids = torch.randint(9, 1000, (2 * pairs, prompt + high), generator=generator)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    answers = torch.randint(low, high, (2 * pairs, 1), generator=generator)
    mask = (torch.arange(prompt + high) < prompt + answers).long()
    padded = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}
    segments = pack(padded, True)["segments"]
    length = sum(segments.pieces)

    def normal(count: int) -> torch.Tensor:
        states = torch.randn(1, count, length, size, device=DEVICE, dtype=DTYPE)
        return states.requires_grad_()

    return segments, normal(heads), normal(groups), normal(groups)


def elapsed(attend: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """Milliseconds of the host, from start to the end of all kernels."""
    segments, *states = inputs
    synchronize()
    began = time.perf_counter()
    torch.autograd.grad(attend(*states, segments).sum(), states)
    synchronize()
    return (time.perf_counter() - began) * 1e3


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def packed_attention(name: str, heads: int, groups: int, size: int):
    """What this package makes of a model's attention of this name."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from axolotl_edpo.models.packed_attention import enable_packing

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=heads * size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        attn_implementation=name,
        dtype=DTYPE,
    )
    model = LlamaForCausalLM(config).to(DEVICE, DTYPE)
    enable_packing(model)
    layer = model.model.layers[0].self_attn
    attend_row = ALL_ATTENTION_FUNCTIONS[name]

    def attend(query, key, value, segments):
        keywords = {"segments": segments, "scaling": size**-0.5, "dropout": 0.0}
        out, _ = attend_row(layer, query, key, value, None, **keywords)
        return out.transpose(1, 2)

    return attend


def sdpa_per_segment(query, key, value, segments):
    """One call of torch's own attention for each segment, as it chooses a kernel."""
    keys, values = key.split(segments.pieces, dim=2), value.split(segments.pieces, 2)
    outputs = []
    for own, sees in zip(query.split(segments.queries, 2), segments.keys, strict=True):
        seen = [torch.cat([x[i] for i in sees], dim=2) for x in (keys, values)]
        q, k = own.shape[2], seen[0].shape[2]
        mask = None  # causal from the upper left: right where no key comes before
        if q < k:
            mask = torch.ones(q, k, dtype=torch.bool, device=own.device).tril(k - q)
        outputs.append(
            F.scaled_dot_product_attention(
                own, *seen, attn_mask=mask, is_causal=q == k, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2)


def sdpa_without_cudnn(query, key, value, segments):
    """Likewise, of the kernels that make no plan per shape."""
    with sdpa_kernel(WITHOUT_CUDNN) if ON_GPU else nullcontext():
        return sdpa_per_segment(query, key, value, segments)


def torch_varlen(query, key, value, segments):
    """One call for the row, FlashAttention's kernels in torch."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = key.split(segments.pieces, dim=2), value.split(segments.pieces, 2)
    seen = [
        torch.cat([x[i] for sees in segments.keys for i in sees], dim=2)
        for x in (keys, values)
    ]

    def starts(lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)

    queries, lengths = segments.queries, segments.key_lengths
    # torch 2.11 shares keys among queries unasked and does not know the keyword
    known = inspect.signature(varlen_attn).parameters
    out = varlen_attn(
        *(x[0].transpose(0, 1) for x in (query, *seen)),
        starts(queries),
        starts(lengths),
        max(queries),
        max(lengths),
        window_size=(-1, 0),
        **({"enable_gqa": True} if "enable_gqa" in known else {}),
    )
    return out.transpose(0, 1)[None]


# --- sanitizer -------------------------------------------------------------------

PROGRAMS = {
    "compute-sanitizer": ["--tool", "memcheck"],
    "ncu": ["--clock-control", "none", "-k", "regex:add_tile", "-c", "1"],
}
PROGRAM_SECONDS = 40


def sanitizer(note: Notes) -> None:
    """The kernels under NVIDIA's tools."""
    run = [sys.executable, "-c", "import gpu_op; gpu_op.{}()"]
    calls = {"compute-sanitizer": "small_call", "ncu": "large_call"}
    for name, options in PROGRAMS.items():
        path = find_program(name)
        if path is None:
            note(name, "not found")
            continue
        command = [path, *options, *run[:2], run[2].format(calls[name])]
        code, lines = output_of(command, PROGRAM_SECONDS)
        ended = f"exit {code}" if code is not None else "stopped, it took too long"
        note(name, [ended, *telling(name, lines)])


def output_of(command: list[str], seconds: float) -> tuple[int | None, list[str]]:
    """Exit status and output of a program; None where it was stopped."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process.pid)  # with what it started, which holds the pipe
        return None, process.communicate()[0].splitlines()
    return process.returncode, text.splitlines()


def find_program(name: str) -> str | None:
    """On the path, or where NVIDIA's installers put it."""
    if found := shutil.which(name):
        return found
    places = ("usr/local/cuda*/bin", "opt/nvidia/nsight-compute/*")
    found = [p for place in places for p in Path("/").glob(f"{place}/{name}")]
    return str(found[-1]) if found else None


def telling(name: str, lines: list[str]) -> list[str]:
    """The lines that say what was found, else the last ones."""
    wanted = {
        "compute-sanitizer": "=====",
        "ncu": "Duration|Throughput|Registers Per|Occupancy|Waves|Block Size|Grid Size",
    }
    found = [line for line in lines if re.search(wanted[name], line)]
    return [re.sub(r"\s+", " ", line).strip() for line in found[-12:] or lines[-5:]]


def small_call() -> None:
    """Sizes that no tile fits: what memcheck runs."""
    inputs = draw(Shape(37, 64, 1001))
    for trained in (False, True):
        step_of(inputs, inputs.weight.clone().requires_grad_(trained), EPSILON)()
    torch.cuda.synchronize()


def large_call() -> None:
    """One full tile and more: what ncu runs."""
    inputs = draw(Shape(4096, 512, 8192))
    step_of(inputs, inputs.weight, EPSILON)()
    torch.cuda.synchronize()
