"""token_stats.py against the naive formula in float64 on the same hidden states.

Everything here runs twice: in PyTorch, and in Triton, which interprets its kernels
where there is no GPU.
"""

import itertools
from functools import partial
from time import process_time

import pytest
import torch
from helpers.tiers import first, only
from helpers.token_stats import (
    NAMES,
    assert_as_exact_as_pytorch,
    gradients,
    inputs,
    naive,
)

from axolotl_edpo.ops import kept_probs, lm_head, tile_torch, tile_triton, walk
from axolotl_edpo.ops.lm_head import Head
from axolotl_edpo.ops.token_stats import logits_stats, token_stats

CASES = {
    "plain": dict(),
    "bias": dict(bias=True),
    "scale": dict(scale=0.25),
    "cap": dict(bias=True, scale=2.0, cap=5.0),
    "lora": dict(rank=3),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = torch.cuda.is_available()

GRADIENT_PER_LOGIT = 2e-7


@pytest.fixture(params=["eager", "triton"])
def backend(request, monkeypatch):
    """Tiles of 2 x 24 for 5 tokens and 61 words: several of each, and none fits."""
    for module in (tile_torch, tile_triton):
        monkeypatch.setattr(module, "CHUNK", 2)
        monkeypatch.setattr(module, "TILE", 24)
    monkeypatch.setattr(tile_triton, "BLOCK", 16)
    return request.param


ALONE = {"capped": {"cap": 5.0, "scale": 0.5}, "plain": {}, "lora": {"rank": 4}}


def device(backend: str) -> str:
    return "cuda" if backend == "triton" and GPU else "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_are_as_exact_as_pytorch_in_that_dtype(backend, case, dtype):
    h, ref, head, y = inputs(**CASES[case], dtype=dtype, device=device(backend))
    ours = token_stats(h, ref, head, head, y, 0.01, sum_sq_probs=True, backend=backend)
    exact = naive(h, ref, head, y, 0.01)
    plain = naive(h, ref, head, y, 0.01, dtype)
    assert_as_exact_as_pytorch(ours, plain, exact, head.logits(h).abs().max())


@pytest.mark.parametrize("trained", first(["all", "hidden"]))
@pytest.mark.parametrize("case", first([*ALONE]))
def test_a_policy_alone_has_its_statistics_and_gradients(backend, case, trained):
    """Those beside a reference, without the ones that compare."""
    h, ref, head, y = inputs(**ALONE[case], device=device(backend))
    leaves = [h] if trained == "hidden" else [h, *head.tensors]
    for leaf in leaves:
        leaf.requires_grad_()
    options = dict(sum_sq_probs=True, backend=backend)
    both = token_stats(h, ref, head, head, y, None, **options)
    alone = token_stats(h, None, head, None, y, None, **options)
    compared = {"reference_logp", "kl"}
    for name in {*NAMES} - compared:
        close = dict(rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(getattr(alone, name), getattr(both, name), **close)
    assert all(getattr(alone, name).isnan().all() for name in compared)
    found, expected = (gradients(s.policy_logp, leaves) for s in (alone, both))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)
    logits = logits_stats(head.logits(h), None, y, None, **options)
    torch.testing.assert_close(logits.policy_logp, alone.policy_logp)
    assert logits.kl.isnan().all() and logits.reference_logp.isnan().all()


@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("size", [1.0, 8.0], ids=["logits-15", "logits-100"])
def test_epsilon_from_tiny_to_huge_at_small_and_large_logits(backend, epsilon, size):
    """At 0.3 and logits of a hundred the policies are worlds apart."""
    h, ref, head, y = inputs(size=size, device=device(backend))
    logits = head.logits(h)
    assert (logits.abs().max() > 100) == (size > 1)
    exact = naive(h, ref, head, y, epsilon)
    plain = naive(h, ref, head, y, epsilon, torch.float32)
    ours = token_stats(
        h, ref, head, head, y, epsilon, sum_sq_probs=True, backend=backend
    )
    assert_as_exact_as_pytorch(ours, plain, exact, logits.abs().max())


# NumPy, in which the interpreter computes, warns of what is replaced afterwards.
OVERFLOWS = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero):RuntimeWarning"
)


def sums_of(monkeypatch):
    """Collects the sums that are made; the op fills them in place."""
    seen = []
    for module in (tile_torch, tile_triton):

        def new_sums(tokens, device, whole=module.new_sums):
            seen.append(whole(tokens, device))
            return seen[-1]

        monkeypatch.setattr(module, "new_sums", new_sums)
    return seen


@OVERFLOWS
def test_policies_worlds_apart_stay_finite_and_exact(backend, monkeypatch):
    """|d| beyond 100: there expm1 overflows, and logsumexps take its place."""
    h, ref, head, y = inputs(distance=2.0, size=10.0, device=device(backend))
    exact = naive(h, ref, head, y, 0.9)
    assert exact.plus.abs().max() > 100
    seen = sums_of(monkeypatch)
    ours = token_stats(h, ref, head, head, y, 0.9, backend=backend)
    size = head.logits(h).abs().max()
    for name, a, b in list(zip(NAMES, ours, exact, strict=True))[:-1]:
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= 4e-6 * size, name
    assert seen[0][tile_torch.LOGSUMEXPS].isfinite().any()
    assert not seen[0][tile_torch.MINUS].isfinite().all()


def drifted(kind: str, nats: float, device: str):
    """Policy, reference and targets; their logsumexps are `nats` apart and more.

    `all`: every logit of the policy rose. `one`: its last token's only, so that it gets
    all probability. `reference`: the last token's fell, so that the reference has
    probability where the policy has none. Fifty nats are a model that is broken.
    """
    h, ref, head, y = inputs(vocab=61, distance=0.01, size=0.3, device=device)
    bias = torch.zeros(61, device=device)
    bias[slice(None) if kind == "all" else slice(60, None)] = nats
    if kind == "reference":
        bias = -bias
    return h, ref, Head(head.weight, bias), Head(head.weight), y


@OVERFLOWS
@pytest.mark.parametrize("nats", first([4.0, 90.0, 0.0, 3.0, 10.0, 50.0], 2))
@pytest.mark.parametrize("kind", ["all", "one", "reference"])
def test_a_drift_of_the_policy_costs_no_digits(backend, kind, nats):
    """What is subtracted from all d changes no result, so signs stay right."""
    h, ref, policy, reference, y = drifted(kind, nats, device(backend))
    ours = token_stats(h, ref, policy, reference, y, 0.01, backend=backend)
    a, b = (
        x.double() @ head.weight.T.double()
        + (0 if head.bias is None else head.bias.double())
        for x, head in ((h, policy), (ref, reference))
    )
    exact = logits_in_double(a, b, y, 0.01)
    size = 1 + max(a.abs().max(), b.abs().max())
    for name, values in exact.items():
        got = getattr(ours, name)
        # d is a difference of logits, and carries the rounding of both
        scale = 0.01 if name in ("plus", "minus") else 1.0
        assert (got - values).abs().max() <= 4e-7 * scale * size, name
        if name in ("plus", "minus"):
            clear = values.abs() > 4e-7 * scale * size
            assert torch.equal(got.sign()[clear], values.sign()[clear].float())


def assert_exact(ours, a, b, y, epsilon, error):
    """Against float64, relative to the size of the logits."""
    size = 1 + max(a.abs().max(), b.abs().max())
    for name, values in logits_in_double(a.double(), b.double(), y, epsilon).items():
        # d is a difference of logits, and carries the rounding of both
        scale = epsilon if name in ("plus", "minus") else 1.0
        got = getattr(ours, name)
        assert (got - values).abs().max() <= error * scale * size, name


@OVERFLOWS
@pytest.mark.parametrize("spread", first([6.0, 40.0, 0.5, 3.0, 12.0], 2))
def test_differences_of_any_spread_cost_no_digits(backend, spread):
    """The policy's favourite changes from tile to tile, and with it d there."""
    g = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(5, 500, generator=g)
    b = a - spread * torch.randn(5, 500, generator=g)
    y = torch.randint(500, (5,), generator=g)
    a, b, y = (x.to(device(backend)) for x in (a, b, y))
    ours = logits_stats(a, b, y, 0.05, backend=backend)
    assert_exact(ours, a, b, y, 0.05, error=1e-6)


@OVERFLOWS
@pytest.mark.parametrize("nats", [5.0, 12.0, 18.0, 25.0, 65.0, 95.0])
def test_a_favourite_that_the_policy_raised_is_forgotten(backend, nats):
    """In the first tile one token rose and one did not; the next has the favourite."""
    a, d = torch.full((1, 72), -30.0), torch.zeros(1, 72)
    a[0, 5], a[0, 7], a[0, 27], d[0, 5] = 0.0, -1.0, 1.0, nats
    a, d, y = (x.to(device(backend)) for x in (a, d, torch.tensor([27])))
    ours = logits_stats(a, a - d, y, 0.05, backend=backend)
    assert_exact(ours, a, a - d, y, 0.05, error=1e-6)


def logits_in_double(a, b, y, epsilon):
    """The statistics that compare policy and reference, of float64 logits."""

    def at_y(logits):
        return logits.log_softmax(-1).gather(1, y[:, None])[:, 0]

    up, down = a + epsilon * (a - b), a - epsilon * (a - b)
    return {
        "policy_logp": at_y(a),
        "reference_logp": at_y(b),
        "plus": at_y(up) - at_y(a),
        "minus": at_y(down) - at_y(a),
        "kl": (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1),
    }


@pytest.mark.parametrize("nats", first([4.0, 50.0, 3.0, 10.0], 2))
@pytest.mark.parametrize("kind", ["all", "one", "reference"])
def test_a_drift_of_the_policy_costs_no_time(kind, nats):
    """Processor time at most 1.5 times that without a drift, in whole tile_torch."""
    tokens, hidden, vocab = 256, 128, 8192
    g = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=g)
    weight = torch.randn(vocab, hidden, generator=g) * hidden**-0.5
    ref = h + 0.02 * torch.randn(tokens, hidden, generator=g)
    y = torch.randint(vocab, (tokens,), generator=g)
    bias = torch.zeros(vocab)
    bias[slice(None) if kind == "all" else slice(-1, None)] = nats
    still, moved = torch.zeros(vocab), -bias if kind == "reference" else bias

    def seconds(bias):
        leaf = h.clone().requires_grad_()
        began = process_time()
        heads = Head(weight, bias), Head(weight, still)
        token_stats(leaf, ref, *heads, y, 0.01).policy_logp.sum().backward()
        return process_time() - began

    turns = [(seconds(moved), seconds(still)) for _ in range(12)]
    drifting, without = (min(times) for times in zip(*turns[2:], strict=True))
    assert drifting <= 1.5 * without


# What a head that trains may keep: its logits are formed again, or are not.
KEEPS = {"again": 0, "kept": 2**20}


@pytest.fixture(params=KEEPS)
def keeps(request, monkeypatch):
    monkeypatch.setattr(kept_probs, "KEPT_BYTES", KEEPS[request.param])
    return request.param == "kept"


# The case and dtype that `make test` takes beside float32.
ROUNDED = ("lora", torch.bfloat16)


@pytest.mark.parametrize(
    ("trained", "keeps"),  # a head that is frozen keeps nothing
    [("hidden", "again"), ("all", "again"), ("all", "kept")],
    indirect=["keeps"],
)
@pytest.mark.parametrize(
    ("case", "dtype"),
    only(
        [(case, dtype) for case in CASES for dtype in DTYPES],
        lambda case, dtype: dtype == torch.float32 or (case, dtype) == ROUNDED,
    ),
)
def test_gradients_are_as_exact_as_pytorch_in_that_dtype(
    backend, case, dtype, trained, keeps
):
    h, ref, head, y = inputs(**CASES[case], dtype=dtype, device=device(backend))
    leaves = [h] if trained == "hidden" else [h, *head.tensors]
    for leaf in leaves:
        leaf.requires_grad_()
    ours, plain, exact = (
        gradients(logp, leaves)
        for logp in (
            token_stats(h, ref, head, head, y, 0.01, backend=backend).policy_logp,
            naive(h, ref, head, y, 0.01, dtype).policy_logp,
            naive(h, ref, head, y, 0.01).policy_logp,
        )
    )
    size = 1 + head.logits(h).abs().max()
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype
        # one rounding to the leaf's dtype is nobody's fault
        rounding = torch.finfo(dtype).eps / 2 + GRADIENT_PER_LOGIT * size
        error, allowed = (a - c).abs().max(), (b - c).abs().max()
        assert error <= allowed + rounding * c.abs().max(), (error, allowed)


def test_the_gradient_of_a_plain_sum(backend, keeps):
    """Autograd hands it over as one value, expanded without memory of its own."""
    h, ref, head, y = inputs(device=device(backend))
    leaves = [h.requires_grad_(), head.weight.requires_grad_()]
    ours = token_stats(h, ref, head, head, y, 0.01, backend=backend).policy_logp
    exact = naive(h, ref, head, y, 0.01).policy_logp
    got, want = (torch.autograd.grad(logp.sum(), leaves) for logp in (ours, exact))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_how_many_products_a_head_takes(backend, keeps, monkeypatch):
    """Policy, reference, gradient of the hidden states; where the head trains, that of
    the weight as well, and, if nothing was kept, the policy's logits again."""
    seen = []
    for name in ("product", "add_product"):
        whole = getattr(lm_head, name)

        def counted(a, b, out, whole=whole):
            seen.append(a.shape[0] * a.shape[1] * b.shape[1])
            whole(a, b, out)

        monkeypatch.setattr(lm_head, name, counted)
    h, ref, head, y = inputs(device=device(backend))
    h.requires_grad_()
    for trains, products in ((False, 3), (True, 4 if keeps else 5)):
        seen.clear()
        head.weight.requires_grad_(trains)
        stats = token_stats(h, ref, head, head, y, 0.01, backend=backend)
        stats.policy_logp.sum().backward()
        assert sum(seen) == products * len(y) * head.weight.numel()
        assert (head.weight.grad is not None) == trains


@OVERFLOWS
@pytest.mark.parametrize("dtype", first([torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("sure", first([3.0, 0.0, 1.0], 2), ids="p-{}".format)
def test_the_head_of_a_sure_policy_keeps_its_gradient(backend, keeps, sure, dtype):
    """Few targets, that come often and with both signs, at a probability near 1.

    onehot(y) - p is small there: made of two parts that are rounded apart, nothing
    would be left of it.
    """
    h, ref, head, _ = inputs(tokens=40, size=0.3, dtype=dtype, device=device(backend))
    y = torch.arange(40, device=h.device) % 5
    h = (h + sure * head.weight[y] / 2).to(dtype)
    leaves = [h.requires_grad_(), head.weight.requires_grad_()]
    ours = token_stats(h, ref, head, head, y, 0.01, backend=backend).policy_logp
    exact = naive(h, ref, head, y, 0.01).policy_logp
    assert (exact.exp().mean() > 0.9) == (sure > 1)
    got, want = (gradients(logp, leaves) for logp in (ours, exact))
    rounding = 2 * torch.finfo(dtype).eps
    rounding += 4 * GRADIENT_PER_LOGIT * (1 + head.logits(h.detach()).abs().max())
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= rounding * b.norm()


def test_evaluation_makes_no_gradient(backend, monkeypatch):
    h, ref, head, y = inputs(device=device(backend))
    h.requires_grad_()
    monkeypatch.setattr(lm_head, "add_product", lambda *_: pytest.fail("a gradient"))
    with torch.no_grad():
        stats = token_stats(h, ref, head, head, y, 0.01, backend=backend)
    assert not stats.policy_logp.requires_grad


def test_more_tokens_than_an_accumulator_holds_give_the_same_gradient(
    backend, keeps, monkeypatch
):
    def run():
        h, ref, head, y = inputs(device=device(backend))
        leaves = [h.requires_grad_(), head.weight.requires_grad_()]
        stats = token_stats(h, ref, head, head, y, 0.01, backend=backend)
        return gradients(stats.policy_logp, leaves)

    whole = run()
    monkeypatch.setattr(walk, "BLOCK_VALUES", 24 * 3)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_policies_give_exactly_zero(backend, dtype):
    h, _, head, y = inputs(dtype=dtype, device=device(backend), scale=1 / 6)
    of_head = token_stats(h, h.clone(), head, head, y, 0.01, backend=backend)
    logits = head.logits(h).to(dtype)
    of_logits = logits_stats(logits, logits.clone(), y, 0.01, backend=backend)
    for stats in (of_head, of_logits):
        ratio = stats.policy_logp - stats.reference_logp
        for values in (stats.plus, stats.minus, stats.kl, ratio):
            assert values.tolist() == [0.0] * len(y)


def test_without_epsilon_everything_else_stays(backend):
    h, ref, head, y = inputs(device=device(backend))
    run = partial(token_stats, h, ref, head, head, y, backend=backend)
    off, on = run(None), run(0.01)
    assert off.plus.tolist() == off.minus.tolist() == [0.0] * len(y)
    assert on.plus.abs().min() > 0
    for name in set(NAMES) - {"plus", "minus"}:
        assert torch.equal(getattr(off, name), getattr(on, name)), name


def test_bf16_products_are_not_rounded_to_bf16(backend):
    """Error against float64 on the same bf16 operands is float32's, not bf16's."""
    kind = dict(hidden=64, distance=0.02, dtype=torch.bfloat16)
    h, ref, head, y = inputs(**kind, device=device(backend))
    with torch.autocast(device(backend), torch.bfloat16):
        ours = token_stats(h, ref, head, head, y, 0.01, backend=backend)
    exact = naive(h, ref, head, y, 0.01)
    assert (ours.plus - exact.plus).abs().max() <= 1e-5 * exact.plus.abs().max()
    assert (ours.policy_logp - exact.policy_logp).abs().max() < 1e-4


def test_under_an_autocast_operands_are_rounded_as_in_the_model(backend, keeps):
    """And products are not: the same as for operands that were in bf16 before."""
    h, ref, head, y = inputs(device=device(backend))
    leaves = [h.requires_grad_(), head.weight.requires_grad_()]
    with torch.autocast(device(backend), torch.bfloat16):
        ours = token_stats(h, ref, head, head, y, 0.01, backend=backend)
    got = gradients(ours.policy_logp, leaves)
    kind = dict(dtype=torch.bfloat16, device=device(backend))
    h, ref, head, y = inputs(**kind)
    leaves = [h.requires_grad_(), head.weight.requires_grad_()]
    want = token_stats(h, ref, head, head, y, 0.01, backend=backend)
    for name, a, b in zip(NAMES, ours, want, strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(got, gradients(want.policy_logp, leaves), strict=True):
        assert a.dtype == torch.float32
        # made in forward, a gradient of the inputs is rounded before it is scaled, too
        roundings = 2 if keeps else 1
        torch.testing.assert_close(a, b.float(), rtol=roundings * 2**-8, atol=0)


@pytest.mark.parametrize(
    ("dtype", "inside"), [(torch.float32, "ieee"), (torch.bfloat16, "tf32")]
)
def test_tf32_is_kept_from_operands_that_it_would_round(dtype, inside, monkeypatch):
    """bf16 has fewer digits than TF32; axolotl sets TF32 on every GPU that has it."""
    matmul, seen = torch.backends.cuda.matmul, []

    def product(*operands, whole=lm_head.product):
        seen.append(matmul.fp32_precision)
        whole(*operands)

    monkeypatch.setattr(lm_head, "product", product)
    h, ref, head, y = inputs(dtype=dtype)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        token_stats(h, ref, head, head, y, 0.01)
        assert set(seen) == {inside}
        assert torch.get_float32_matmul_precision() == "high"
        assert (matmul.fp32_precision, matmul.allow_tf32) == ("tf32", True)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("everywhere", [True, False])
def test_tf32_of_the_newer_interface_alone_is_no_error(everywhere, monkeypatch):
    """transformers sets it so (`tf32: true`), and then torch's older getter raises."""
    matmul, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    seen = []

    def modes():
        return matmul.fp32_precision, mkldnn.fp32_precision

    def product(*operands, whole=lm_head.product):
        seen.append(modes())
        whole(*operands)

    monkeypatch.setattr(lm_head, "product", product)
    switches = torch.backends, matmul, mkldnn
    try:
        for switch in switches:
            switch.fp32_precision = "none"
        (torch.backends if everywhere else matmul).fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        h, ref, head, y = inputs()
        token_stats(h, ref, head, head, y, 0.01)
        assert set(seen) == {("ieee", "ieee")}
        assert modes() == ("tf32", "tf32" if everywhere else "none")
    finally:
        for switch in switches:
            switch.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("module", [tile_torch, tile_triton])
def test_few_tokens_meet_wide_tiles(module):
    """A product keeps its size, and a tile its memory."""
    sizes = {n: module.tile_size(n) for n in (1, 300, module.CHUNK // 2, module.CHUNK)}
    assert list(sizes.values()) == [2 * module.TILE] * 3 + [module.TILE]
    cells = module.CHUNK * module.TILE
    assert all(min(n, module.CHUNK) * tile <= cells for n, tile in sizes.items())


@pytest.mark.parametrize("tokens", first([3, 4, 1, 2], 2))
@pytest.mark.parametrize("tile", first([7, 64, 61], 2))
def test_values_and_gradients_do_not_depend_on_tiles(
    backend, keeps, tokens, tile, monkeypatch
):
    h, ref, head, y = inputs(tokens=tokens, bias=True, device=device(backend))
    leaves = [h.requires_grad_(), head.weight.requires_grad_()]

    def run():
        stats = token_stats(h, ref, head, head, y, 0.01, backend=backend)
        return [*stats, *gradients(stats.policy_logp, leaves)]

    before = run()
    for module in (tile_torch, tile_triton):
        monkeypatch.setattr(module, "TILE", tile)
    for a, b in zip(run(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_work_and_carry_a_gradient(backend, tokens):
    h, ref, head, y = inputs(tokens=tokens, device=device(backend))
    for trains in (False, True):
        h.grad = None
        h.requires_grad_()
        head.weight.requires_grad_(trains)
        stats = token_stats(h, ref, head, head, y, 0.01, backend=backend)
        assert all(values.shape == (tokens,) for values in stats)
        stats.policy_logp.sum().backward()
        assert h.grad.shape == h.shape
        assert (h.grad != 0).any() == (tokens > 0)
    assert (head.weight.grad != 0).any() == (tokens > 0)


def test_shapes_that_do_not_fit_are_refused():
    h, ref, head, y = inputs()
    with pytest.raises(ValueError, match="5 targets for 4 policy"):
        token_stats(h[1:], ref, head, head, y, 0.01)
    with pytest.raises(ValueError, match="5 targets for 4 policy positions"):
        token_stats(h[1:], None, head, None, y, None)
    with pytest.raises(ValueError, match="vocabulary of 61, reference of 60"):
        token_stats(h, ref, head, Head(head.weight[:60]), y, 0.01)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_logits_that_a_model_computed_give_the_same(backend, size):
    h, ref, head, y = inputs(size=size, cap=50.0, device=device(backend))
    logits = [head.logits(x) for x in (h, ref)]
    logits[0].requires_grad_()
    stats = logits_stats(*logits, y, 0.01, sum_sq_probs=True, backend=backend)
    ours = token_stats(h, ref, head, head, y, 0.01, sum_sq_probs=True, backend=backend)
    for name, a, b in zip(NAMES, stats, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    (grad,) = torch.autograd.grad(stats.policy_logp.sum(), logits[0])
    onehot = torch.nn.functional.one_hot(y, head.vocab)
    torch.testing.assert_close(grad, onehot - logits[0].softmax(-1).detach())


def peak_of_tensors(run) -> int:
    """Most bytes of tensors that `run` had at a time, as PyTorch allocated them."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_that_of_a_tile_whatever_tokens_and_vocabulary(trained, monkeypatch):
    """Logits of the larger case take 500 MiB, four times those of the smaller."""

    def extra(tokens, vocab):
        h, ref, head, y = inputs(tokens=tokens, vocab=vocab, hidden=16, size=0.2)
        h.requires_grad_()
        head.weight.requires_grad_(trained)

        def run():
            stats = token_stats(h, ref, head, head, y, 0.01)
            stats.policy_logp.sum().backward()

        return peak_of_tensors(run) / 2**20

    monkeypatch.setattr(kept_probs, "KEPT_BYTES", 0)
    matrices = tile_torch.MATRICES * tile_torch.CHUNK * tile_torch.TILE * 4 / 2**20
    small, large = extra(2048, 16000), extra(4096, 32000)
    assert matrices == 16 and matrices < small < 1.5 * matrices
    assert large < small + 1
