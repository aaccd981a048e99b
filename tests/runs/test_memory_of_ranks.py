"""The calculated memory per GPU against what a small model uses on two CPU ranks.

`Watch` knows every live tensor of a rank: it sees each operation of a training run, in
C++ too (DDP's buckets), and looks at their sizes every few operations. So it also
counts the weights that ZeRO-3 and FSDP2 have gathered at that moment.
"""

import functools
import gc
import json
import random
import time
import weakref

import pytest
import torch
from helpers import ranks, tiny
from helpers.tiers import first, only, rest
from helpers.tiny import LLAMA_8M
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from axolotl_edpo.tools.memory import Arguments, Memory
from axolotl_edpo.tools.model_sizes import sizes_of
from axolotl_edpo.trainer import EDPOTrainer
from axolotl_edpo.training import assembly

LETTERS, RANKS = 50, 2
# DeepSpeed's own bounds are in the millions and would keep a small model whole.
ZERO3 = dict.fromkeys(
    (
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    ),
    0,
)
# else the gradients that accumulate are whole
SYNC = {
    "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
}
LORA = dict(adapter="lora", lora_r=8, lora_alpha=16, lora_target_linear=True)


# --- on the ranks ----------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Bytes of all live tensors and numbers of whole weights, at most and now."""

    EVERY = 20  # operations per look

    def __init__(self, trainer):
        super().__init__()
        self._operations, self.looks = 0, False
        self._storages = weakref.WeakValueDictionary()
        # weak: a cache lets go of the reference
        self._models = [weakref.WeakSet(m.modules()) for m in models_of(trainer)]
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self._add(thing)
        self.peak, self.most_whole = 0, [0 for _ in self._models]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for thing in tree_leaves(out):
            if isinstance(thing, torch.Tensor):
                self._add(thing)
        self._operations += 1
        if self.looks and self._operations % self.EVERY == 0:
            self.look()
        return out

    def _add(self, tensor):
        own = local(tensor)
        if own.device.type == "cpu" and own.layout == torch.strided:
            storage = own.untyped_storage()
            self._storages[storage._cdata] = storage

    def forget(self, tensors):
        """They are on disk, mapped into memory."""
        for tensor in tensors:
            self._storages.pop(tensor.untyped_storage()._cdata, None)

    def look(self):
        self.peak = max(self.peak, self.live())
        now = map(whole, self._models)
        self.most_whole = list(map(max, self.most_whole, now))

    def live(self) -> int:
        return sum(storage.nbytes() for storage in list(self._storages.values()))

    def settled(self) -> int:
        """`live`, once gloo's threads let go of what they have gathered or reduced.

        They do so a moment after the collective is done: a long one on a busy machine.
        """
        looks = []
        for _ in range(5):
            looks.append(self.live())
            time.sleep(0.05)
        return min(looks)


def local(tensor):
    """What FSDP2 has of it on this rank."""
    return getattr(tensor, "_local_tensor", tensor)


def models_of(trainer) -> list:
    """The policy and, where it is a model of its own, the reference."""
    return [m for m in (trainer.model, trainer.ref_model) if m is not None]


def whole(modules) -> int:
    """How many of their weights are whole on this rank."""
    count = 0
    for module in modules:
        for weight in module._parameters.values():
            if hasattr(weight, "ds_status"):  # ZeRO-3
                missing = weight.ds_status.name == "NOT_AVAILABLE"
                count += 0 if missing else weight.ds_numel
            elif weight is not None and local(weight) is weight:
                count += weight.numel()
    return count


def bytes_of(tensors) -> int:
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def shards(weights) -> list:
    return [getattr(weight, "ds_tensor", weight) for weight in weights]


def reference_tensors(trainer) -> list:
    """Those of a model of its own, or the head that a cache leaves of it."""
    if trainer.ref_model is not None:
        return [*trainer.ref_model.parameters()]
    head = getattr(trainer.reference, "kept_head", None)
    return [*head.tensors] if head else []


def optimizer_tensors(trainer) -> list:
    """The moments, and the 32-bit weights where DeepSpeed keeps them."""
    optimizer, copies = trainer.optimizer, []
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            copies += getattr(optimizer, name, [])
    states = (value for state in optimizer.state.values() for value in state.values())
    return [*copies, *(value for value in states if isinstance(value, torch.Tensor))]


def measure(train):
    """The probe: parts at the last micro-batch's start, the peak from the first on.

    Of a pass that fills a cache: `before`, its peak, and `left`, bytes of the
    reference's own weights that outlive it.
    """
    found, watches = {}, []
    run, loss = EDPOTrainer.train, EDPOTrainer.compute_loss
    fill = assembly.fill_cache

    def watched(self, *args, **kwargs):
        with Watch(self) as watch:
            watches.append(watch)
            return run(self, *args, **kwargs)

    def filled(trainer, *args):
        watches[0].looks = True
        weights = [weakref.ref(weight) for weight in reference_tensors(trainer)]
        fill(trainer, *args)
        left = shards(weight() for weight in weights if weight() is not None)
        found.update(before=watches[0].peak, left=bytes_of(left))
        watches[0].peak = 0
        shards_on_disk = trainer.reference.cache.shards
        watches[0].forget(shard.kept for shard in shards_on_disk)

    def measured(self, model, inputs, *args, **kwargs):
        gc.collect()
        watches[0].looks, models = True, models_of(self)
        parts = dict(
            weights=bytes_of(shards(self.model.parameters())),
            optimizer=bytes_of(optimizer_tensors(self)),
            reference=bytes_of(shards(reference_tensors(self))),
        )
        width = self.model.dtype.itemsize
        gathered = sum(width * whole(m.modules()) for m in models if is_sharded(m))
        rest = watches[0].settled() - sum(parts.values()) - gathered
        found.update(parts, gradients=rest, tokens=inputs["input_ids"].numel())
        return loss(self, model, inputs, *args, **kwargs)

    EDPOTrainer.train, EDPOTrainer.compute_loss = watched, measured
    assembly.fill_cache = filled
    trainer = train()
    found.update(peak=watches[0].peak, whole=watches[0].most_whole)
    return trainer, found


def is_sharded(model) -> bool:
    return any(hasattr(p, "ds_status") or local(p) is not p for p in model.parameters())


# --- runs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """Trains two steps of two micro-batches, once per engine and recipe."""
    folder = tmp_path_factory.mktemp("memory")
    model, pairs = tiny.save_model(folder / "model", **LLAMA_8M), save_pairs(folder)

    @functools.cache
    def run(engine: str, lora: bool, bf16: bool, cached: bool) -> dict:
        keys = dict(micro_batch_size=1, max_steps=2, gradient_checkpointing=True)
        keys |= dict(optimizer="adamw_torch_fused", bf16=bf16)
        keys |= engine_keys(folder, engine, bf16) | (LORA if lora else {})
        own = folder / f"{engine}-{lora}-{bf16}-{cached}"
        if cached:
            keys |= dict(tiny.CACHED, edpo_reference_cache=str(own / "cache"))
        recipe = tiny.recipe(folder, model, pairs, **keys)
        first, second = ranks.run(own, recipe, RANKS, "test_memory_of_ranks:measure")
        assert first["whole"] == second["whole"]
        return first

    return lambda engine, lora=False, bf16=False, cached=False: run(
        engine, lora, bf16, cached
    )


def save_pairs(folder, letters: int = LETTERS):
    rng = random.Random(0)

    def said(role: str) -> dict:
        return {"role": role, "content": "".join(rng.choices("abcdefgh", k=letters))}

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(8):
            user = said("user")
            chosen, rejected = ([user, said("assistant")] for _ in range(2))
            row = dict(prompt=user["content"], chosen=chosen, rejected=rejected)
            file.write(json.dumps(row) + "\n")
    return folder / "pairs.jsonl"


def engine_keys(folder, engine: str, bf16: bool) -> dict:
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        return dict(fsdp_version=2, fsdp_config=ranks.FSDP2, **SYNC)
    stage = int(engine[-1])
    zero = dict(stage=stage, contiguous_gradients=True, reduce_bucket_size="auto")
    keys = {**ranks.ZERO, "bf16": {"enabled": bf16}}
    keys |= dict(zero_optimization=zero | (ZERO3 if stage == 3 else {}))
    path = folder / f"{engine}-{bf16}.json"
    path.write_text(json.dumps(keys))
    return dict(deepspeed=str(path))


def calculated(
    used, engine: str, lora: bool = False, bf16: bool = False, cached: bool = False
) -> Memory:
    return Arguments(
        sizes_of(LlamaConfig(**LLAMA_8M)),
        engine,
        RANKS,
        used(engine, lora, bf16, cached)["tokens"],
        lora=8 * lora,
        cached=cached,
        itemsize=2 if bf16 else 4,
        float32_root=bf16 and not lora and engine == "ddp",
        sync=True,
        live=0,
        device="cpu",
    ).memory


# --- tests -----------------------------------------------------------------------

PARTS = ("weights", "gradients", "optimizer", "reference")
FULL = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LARGE = ("zero3", "fsdp2")  # those that share out the weights
CACHING = ("fsdp2", "zero3", "ddp", "zero2")
RECIPES = [
    *((engine, False, False, False) for engine in FULL),
    ("zero3", False, True, False),
    ("fsdp2", True, True, False),
    ("ddp", True, True, False),
    *((engine, False, False, True) for engine in CACHING),
    ("fsdp2", True, True, True),
]


def is_large(engine: str, lora: bool, bf16: bool, cached: bool) -> bool:
    return (engine == "fsdp2" or not cached) and engine in LARGE and not lora | bf16


@pytest.mark.parametrize("engine, lora, bf16, cached", only(RECIPES, is_large))
def test_every_part_is_as_calculated(used, engine, lora, bf16, cached):
    recipe = (engine, lora, bf16, cached)
    parts, need = used(*recipe), calculated(used, *recipe)
    print(f"\n{engine} {lora=} {bf16=} {cached=}: calculated, measured MB")
    for name in PARTS:
        print(f"  {name:10} {getattr(need, name) / 1e6:7.2f} {parts[name] / 1e6:7.2f}")
    print(f"  peak       {need.total / 1e6:7.2f} {parts['peak'] / 1e6:7.2f}")
    slack = 0.01 * need.resident  # a batch, a bucket of DeepSpeed
    for name in PARTS:
        assert parts[name] == pytest.approx(getattr(need, name), rel=0.05, abs=slack)
    assert 0.65 * need.total < parts["peak"] < 1.03 * need.total


@pytest.mark.parametrize("engine", LARGE)
def test_no_rank_ever_holds_all_weights(used, engine):
    sizes = sizes_of(LlamaConfig(**LLAMA_8M))
    for most in used(engine)["whole"]:  # of the policy, of the reference
        print(f"\n{engine}: at most {most / sizes.all:.0%} of the weights are whole")
        assert 0 < most <= sizes.root + sizes.layer < sizes.all / 2


@rest
def test_every_rank_of_ddp_holds_all_weights(used):
    sizes = sizes_of(LlamaConfig(**LLAMA_8M))
    assert used("ddp")["whole"] == [sizes.all, sizes.all]


@pytest.mark.parametrize("engine", first(CACHING))
def test_a_cache_lets_go_of_the_reference(used, engine):
    """From live bytes: whatever else held its weights would count."""
    own, cached = used(engine), used(engine, cached=True)
    need = calculated(used, engine, cached=True)
    # a whole head is kept as a copy, as on a CPU it is part of a mapped file
    assert cached["left"] == (need.reference if engine in ("zero3", "fsdp2") else 0)
    let_go = sum(own[name] - cached[name] for name in PARTS)
    assert let_go == pytest.approx(need.let_go, rel=0.02)
    print(f"\n{engine}: peak {own['peak'] / 1e6:.2f} MB without, ", end="")
    print(f"{cached['peak'] / 1e6:.2f} with, {cached['before'] / 1e6:.2f} before")
    assert own["peak"] - cached["peak"] > 0.9 * need.let_go
    # the optimizer would be there in a run that was resumed
    most = need.resident - need.gradients + need.let_go + need.activations
    assert 2 * need.weights < cached["before"] < most
    assert cached["whole"] == own["whole"]  # in the pass, too


@rest
@pytest.mark.parametrize(
    ("checkpoints", "half", "quarter"), [(False, 0.6, 0.3), (True, 0.7, 0.5)]
)
def test_activations_fall_with_the_ranks_that_divide_a_row(
    tmp_path, checkpoints, half, quarter
):
    """A row of one pair, of 1,200 tokens; the largest rank. Weights are whole on it."""
    model = tiny.save_model(tmp_path / "model", **{**LLAMA_8M, "vocab_size": 300})
    pairs = save_pairs(tmp_path, letters=400)
    keys = dict(micro_batch_size=1, max_steps=2, gradient_accumulation_steps=1)
    keys |= dict(sequence_len=1024, sample_packing=True)
    keys |= dict(gradient_checkpointing=checkpoints)
    used, peaks, tokens = [], [], []
    for size in (1, 2, 4):
        recipe = tiny.recipe(tmp_path, model, pairs, **keys, context_parallel_size=size)
        own = tmp_path / str(size)
        probe = "test_memory_of_ranks:measure"
        every = ranks.run(own, {**recipe, "output_dir": str(own)}, size, probe)
        most = max(every, key=lambda one: one["peak"])
        used.append(most["peak"] - sum(most[name] for name in PARTS))
        peaks.append(most["peak"])
        tokens.append(most["tokens"])
    for name, values in (("peak", peaks), ("beside weights", used)):
        print(f"\n{name}, MB at degree 1, 2, 4:", [round(v / 1e6, 1) for v in values])
    assert tokens == [tokens[0], -(-tokens[0] // 2), -(-tokens[0] // 4)]
    assert used[1] < half * used[0] and used[2] < quarter * used[0]
    assert peaks[2] < peaks[1] < peaks[0]


@rest
def test_peak_falls_from_engine_to_engine(used):
    peaks = {engine: used(engine)["peak"] for engine in FULL}
    ratios = {engine: peak / peaks["ddp"] for engine, peak in peaks.items()}
    print("\npeak relative to ddp:", {k: round(v, 2) for k, v in ratios.items()})
    assert ratios["zero1"] < 0.9
    assert ratios["zero2"] < ratios["zero1"]
    assert ratios["zero3"] < 0.85 * ratios["zero2"]
    assert ratios["fsdp2"] < 0.85 * ratios["zero2"]
