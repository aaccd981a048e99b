"""Calculates the memory per GPU of a run, to choose an engine for a model.

Weights are counted on the meta device, for any architecture of transformers
(model_sizes.py). Activations are estimated for decoder layers with a gated MLP (Llama,
Mistral, Qwen, Gemma). recipe_memory.py says what to calculate for a recipe.

The peak is the memory between micro-batches (weights, gradients, optimizer, reference)
plus the largest of

    in a micro-batch              head, layer, activations
    in the optimizer step         step
    before the first micro-batch  let_go and activations, minus gradients

Assumed: bf16 weights, fused AdamW, gradient accumulation, gradient checkpointing,
FlashAttention, every token scored. Not counted: the CUDA context, fragmentation,
buffers of NCCL, buckets of DeepSpeed, 4-bit weights while they are dequantized.
tests/unit/tools/test_memory.py compares the parts with a small model on two ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..ops.kept_probs import KEPT_BYTES
from ..ops.walk import BLOCK_VALUES
from .model_sizes import Sizes

Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
# In a micro-batch, in the optimizer step, before the first micro-batch.
Phase = Literal["micro-batch", "step", "start"]

# CHUNK, TILE and MATRICES of ops/tile_triton.py and ops/tile_torch.py.
TILES = {"cuda": (4096, 4096, 2), "cpu": (1024, 1024, 4)}
# Bytes per value of NF4: 4 bits, 8 bits per 64 values for their scale, and 32 bits per
# 256 scales.
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# DeepSpeed's defaults: `stage3_max_live_parameters`, `sub_group_size`
LIVE, SUB_GROUP = 10**9, 10**9


class Memory(NamedTuple):
    """Bytes per GPU.

    Attributes:
        weights: Weights of the policy.
        gradients: Gradients that accumulate between micro-batches, and for DDP with
            several GPUs their copy in its buckets.
        optimizer: AdamW's two moments, and DeepSpeed's float32 copy of the weights.
        reference: Weights of a reference that is a separate model. If it has a cache,
            only its head; nothing if only log-probabilities are kept, or if the loss
            has no reference.
        head: Matrices and hidden states of the op, the gradient of a head that trains,
            and for ZeRO-3 and FSDP2 the gathered embedding and head.
        layer: For ZeRO-3 and FSDP2, gathered layers and the gradient of one layer. For
            ZeRO-2, the gradients of one micro-batch before they are accumulated.
        activations: The inputs of all layers, and all activations of one layer.
        step: Gradients in float32, which DeepSpeed makes in its optimizer step.
        let_go: Weights of a reference with a cache that are freed before the first
            micro-batch: all except `reference`.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float
    head: float
    layer: float
    activations: float
    step: float
    let_go: float

    @property
    def resident(self) -> float:
        """Bytes between micro-batches."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def phases(self) -> Mapping[Phase, float]:
        """Bytes in each phase, as upper bounds: parts of a phase may peak apart.

        While the whole reference is in memory, a resumed run has its optimizer, but no
        gradients. The reference's forward then needs at most `activations`.
        """
        within = self.head + self.layer + self.activations
        before = self.let_go - self.gradients + self.activations
        return {
            "micro-batch": self.resident + within,
            "step": self.resident + self.step,
            "start": self.resident + before,
        }

    @property
    def total(self) -> float:
        """Peak bytes: those of the phase that needs most."""
        return max(self.phases.values())


@dataclass(frozen=True)
class Training:
    """The model and what is trained, independent of the engine.

    Attributes:
        sizes: Sizes of the model.
        ranks: Number of GPUs.
        replicas: Groups of GPUs under FSDP2; each shares out all weights.
        full: Whether all weights train; if not, an adapter does.
        trained: Number of values that train.
        weights: Bytes of the model's weights, without an adapter.
        layer: Bytes of the weights of a decoder layer.
        itemsize: Bytes per weight in the model's dtype.
    """

    sizes: Sizes
    ranks: int
    replicas: int
    full: bool
    trained: int
    weights: float
    layer: float
    itemsize: int

    def trainable(self, adapter_itemsize: int) -> float:
        """Bytes of the weights that train.

        Args:
            adapter_itemsize: Bytes per weight of an adapter.
        """
        return self.weights if self.full else adapter_itemsize * self.trained


class EngineMemory(NamedTuple):
    """The parts that depend on what an engine shards.

    Attributes:
        shards: Number of ranks that share the weights; 1: each rank has all of them.
        trainable: Bytes of the weights that train, over all ranks.
        gradients: Bytes per GPU, see `Memory`.
        optimizer: Bytes per GPU, see `Memory`.
        whole_head: Number of values of embedding, head and their gradients that are
            unsharded at the same time.
        layer: Bytes per GPU, see `Memory`.
        step: Bytes per GPU, see `Memory`.
    """

    shards: int
    trainable: float
    gradients: float
    optimizer: float
    whole_head: int
    layer: float = 0
    step: float = 0


def _ddp(training: Training) -> EngineMemory:
    """Nothing is sharded. Adapters are in float32. One GPU has no buckets."""
    trainable = training.trainable(adapter_itemsize=4)
    copies = 2 if training.ranks > 1 else 1  # also in the buckets
    return EngineMemory(
        shards=1,
        trainable=trainable,
        gradients=copies * trainable,
        optimizer=2 * trainable,
        whole_head=training.sizes.head * training.full,
    )


def _zero1(training: Training) -> EngineMemory:
    """The optimizer is sharded."""
    trainable = training.trainable(training.itemsize)
    return EngineMemory(
        shards=1,
        trainable=trainable,
        gradients=trainable,
        optimizer=_zero_optimizer(training),
        whole_head=training.sizes.head * training.full,
        step=4 * training.trained / training.ranks,
    )


def _zero2(training: Training) -> EngineMemory:
    """Optimizer and gradients are sharded."""
    trainable = training.trainable(training.itemsize)
    return EngineMemory(
        shards=1,
        trainable=trainable,
        gradients=trainable / training.ranks,
        optimizer=_zero_optimizer(training),
        # the gradient, and its copy in the send buffer
        whole_head=2 * training.sizes.head * training.full,
        layer=trainable / training.ranks,
        step=4 * training.trained / training.ranks,
    )


def _zero3(training: Training, live: int) -> EngineMemory:
    """Everything is sharded; up to `live` weights are gathered at the same time."""
    sizes, trainable = training.sizes, training.trainable(training.itemsize)
    whole_layers = max(1, (min(sizes.all, live) - sizes.root) / sizes.layer)
    return EngineMemory(
        shards=training.ranks,
        trainable=trainable,
        gradients=trainable / training.ranks,
        optimizer=_zero_optimizer(training),
        # the reference's head, then the gradient
        whole_head=sizes.root + sizes.head * training.full,
        layer=training.layer * (whole_layers + training.full),
        step=4 * min(training.trained / training.ranks, SUB_GROUP),
    )


def _fsdp2(training: Training, sync: bool) -> EngineMemory:
    """Everything is sharded, but without `sync` not the gradients that accumulate."""
    sizes, trainable = training.sizes, training.trainable(training.itemsize)
    head, shards = sizes.head * training.full, training.ranks // training.replicas
    return EngineMemory(
        shards=shards,
        trainable=trainable,
        gradients=trainable / shards if sync else trainable,
        optimizer=2 * trainable / shards,
        # the reference's head, then the gradient and its copy in the send buffer
        whole_head=sizes.root + max(head, 2 * sizes.root * training.full),
        # the next layer is gathered in advance
        layer=training.layer * 2 * (1 + training.full),
    )


def _zero_optimizer(training: Training) -> float:
    """Bytes per GPU of two moments and the weights, in float32."""
    return 12 * training.trained / training.ranks


class Arguments(NamedTuple):
    """What the memory of a run with `rl: edpo` depends on.

    Attributes:
        sizes: Sizes of the model, see `sizes_of`.
        engine: DDP, one of DeepSpeed's ZeRO stages, or FSDP2.
        ranks: Number of GPUs.
        tokens: Tokens of a micro-batch: of chosen and rejected, with padding.
        lora: Rank of an adapter on all linear layers; 0: all weights train.
        four_bit: Whether those layers are in 4 bits (`adapter: qlora`).
        cached: Whether the reference has a cache (`precompute_ref_log_probs`).
        two_numbers: Whether the cache keeps two log-probabilities per pair, no hidden
            states (`edpo_control: fixed` or `batch_margin`). Then the reference's head
            is not needed.
        reference_free: Whether the loss has no reference (`dpo_loss_type: [simpo]`).
        itemsize: Bytes per weight.
        float32_root: Whether embedding and head are in float32. axolotl does this if
            all weights train with `ddp` and attention is `sdpa` or `eager`.
        sync: Whether FSDP2 reduces gradients after every micro-batch (accelerate's
            `sync_each_batch`). If not, the accumulated gradients are unsharded.
        live: `stage3_max_live_parameters`: most weights that ZeRO-3 keeps gathered.
        device: `cuda` or `cpu`; the op's matrices differ in size.
        context: Number of GPUs that divide the tokens among them
            (`context_parallel_size`); they are among `ranks`.
        replicas: Groups of GPUs under FSDP2, each of which shares out all weights
            (`dp_replicate_size`).
    """

    sizes: Sizes
    engine: Engine
    ranks: int
    tokens: int
    lora: int = 0
    four_bit: bool = False
    cached: bool = False
    two_numbers: bool = False
    reference_free: bool = False
    itemsize: int = 2
    float32_root: bool = False
    sync: bool = False
    live: int = LIVE
    device: str = "cuda"
    context: int = 1
    replicas: int = 1

    @property
    def memory(self) -> Memory:
        """Bytes per GPU. `head` to `activations` and `step` are upper bounds."""
        training = self._training
        parts = _engine_memory(training, self.engine, self.live, self.sync)
        separate = training.full and not self.reference_free
        reference = training.weights / parts.shards if separate else 0
        itemsize, tokens = self.itemsize, -(-self.tokens // self.context)
        head = (4 if self.float32_root else itemsize) * self.sizes.head / parts.shards
        compares = not (self.reference_free or self.cached and self.two_numbers)
        kept = head * compares if separate and self.cached else reference
        adapter = 0 if training.full else parts.trainable
        tiles = _tiles(
            self.sizes, tokens, itemsize, self.device, training.full, compares
        )
        return Memory(
            weights=(training.weights + adapter) / parts.shards,
            gradients=parts.gradients,
            optimizer=parts.optimizer,
            reference=kept,
            head=tiles + itemsize * parts.whole_head,
            layer=parts.layer,
            activations=_activations(self.sizes, tokens, itemsize),
            step=parts.step,
            let_go=reference - kept,
        )

    @property
    def _training(self) -> Training:
        sizes, itemsize, full = self.sizes, self.itemsize, not self.lora
        saved = (itemsize - NF4) * sizes.linear if self.four_bit else 0
        weights = itemsize * sizes.all - saved
        return Training(
            sizes=sizes,
            ranks=self.ranks,
            replicas=self.replicas,
            full=full,
            trained=sizes.all if full else self.lora * sizes.lora,
            weights=weights + (4 - itemsize) * sizes.root * self.float32_root,
            layer=itemsize * sizes.layer - saved / sizes.layers,
            itemsize=itemsize,
        )


def _engine_memory(
    training: Training, engine: Engine, live: int, sync: bool
) -> EngineMemory:
    if engine == "zero3":
        return _zero3(training, live)
    if engine == "fsdp2":
        return _fsdp2(training, sync)
    return {"ddp": _ddp, "zero1": _zero1, "zero2": _zero2}[engine](training)


def _activations(sizes: Sizes, tokens: int, itemsize: int) -> int:
    """Bytes of the inputs of all layers and the last norm, and of all in one layer."""
    inputs = (sizes.layers + 1) * sizes.hidden * itemsize
    in_dtype, in_float32 = sizes.per_token
    return tokens * (inputs + in_dtype * itemsize + in_float32 * 4)


def _tiles(
    sizes: Sizes,
    tokens: int,
    itemsize: int,
    device: str,
    trains: bool,
    compares: bool,
) -> int:
    """Bytes of the op (ops/token_stats.py): hidden states, and the larger of two sums.

    forward    the matrices of a tile; also the gradient of the hidden states, unless
               the head trains and its numerators are too many to keep
    backward   only if the head trains: the gradient of a tile's rows, and either the
               numerators, or a tile of logits and the gradient of the hidden states

    Args:
        sizes: Sizes of the model.
        tokens: Tokens of a micro-batch.
        itemsize: Bytes per weight.
        device: `cuda` or `cpu`.
        trains: Whether the head trains.
        compares: Whether the reference has hidden states, and a matrix of logits.
    """
    chunk, tile, matrices = TILES[device]
    matrices -= not compares
    vocab = sizes.head // sizes.hidden
    cells = min(chunk, tokens) * min(tile, vocab)
    values = tokens * sizes.hidden
    gradient = 4 * min(values, BLOCK_VALUES) + itemsize * values
    numerators = (itemsize if device == "cuda" else 4) * tokens * vocab * trains
    kept = numerators <= KEPT_BYTES
    forward, backward = 4 * cells * matrices, 0
    if kept:
        forward += gradient + (numerators or itemsize * cells)
    if trains:
        rows = 4 * min(tile, vocab) * sizes.hidden
        again = (4 + itemsize) * cells + gradient
        backward = rows + (numerators + 3 * itemsize * values if kept else again)
    return (1 + compares) * itemsize * values + max(forward, backward)
