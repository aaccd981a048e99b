"""Memory per GPU of a run, by calculation: which engine does a model need?

    python -m axolotl_edpo.tools.memory CONFIG --ranks 8 --tokens 4096

CONFIG is a folder with a model's config.json, the file, or a name on the hub. Weights
are counted on the meta device, so any architecture that transformers knows is right;
activations are those of a decoder layer with gated MLP (Llama, Mistral, Qwen, Gemma).

    between micro-batches   weights, gradients, optimizer, reference
    + within one            head, layer, activations
    or at the update        step, where that is more
    or before the first     let_go for gradients, where that is more

Assumed: bf16 as axolotl loads it, a fused AdamW, gradient accumulation, gradient
checkpointing, FlashAttention, every token scored. Left out: the CUDA context, what the
allocator cannot use (fragmentation), buffers of NCCL and DeepSpeed's buckets, 4-bit
weights while they are dequantized. tests/unit/tools/test_memory.py compares the parts
with what a small model uses on two ranks.
"""

import argparse
from typing import Literal, NamedTuple, get_args

import torch
from accelerate.utils.other import is_repeated_blocks
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ..ops.token_stats import BLOCK_VALUES, KEPT_BYTES

Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]

# Tokens and vocabulary of the head's tile, and how many there are: kernels.py, tiles.py
TILES = {"cuda": (4096, 4096, 2), "cpu": (1024, 1024, 4)}
# NF4, per value: 4 bits, a scale of 8 bits for 64 values, of 32 bits for 256 scales
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# What DeepSpeed has by itself: `stage3_max_live_parameters`, `sub_group_size`
LIVE, SUB_GROUP = 10**9, 10**9


class Sizes(NamedTuple):
    """A model in numbers of values.

    Attributes:
        all: Every weight, without adapters.
        linear: Of these, in linear layers of the decoder: what `qlora` has in 4 bits.
        lora: An adapter of rank 1 on those layers.
        layer: A decoder layer, the largest.
        root: Outside of decoder layers: embedding, head, last norm.
        head: The head, shape (vocab, hidden).
        layers: How many decoder layers there are.
        hidden: Width of the hidden states.
        per_token: What backward needs of a layer per token, in values of the weights'
            dtype and in float32, see `sizes_of`.
    """

    all: int
    linear: int
    lora: int
    layer: int
    root: int
    head: int
    layers: int
    hidden: int
    per_token: tuple[int, int]


class Memory(NamedTuple):
    """Bytes per GPU.

    Attributes:
        weights: Of the policy.
        gradients: Kept between micro-batches; DDP has them in its buckets, too.
        optimizer: AdamW's two moments, and DeepSpeed's 32-bit copy of the weights.
        reference: Of its own, without an adapter; with a cache its head.
        head: The op's tiles and hidden states, the gradient of a head that trains, and
            the embedding and head that ZeRO-3 and FSDP2 gather whole.
        layer: What ZeRO-3 and FSDP2 gather beyond that, and its whole gradient; under
            ZeRO-2 the gradients of one micro-batch, before they are added.
        activations: The input of every layer, and everything within one.
        step: Gradients in float32, during DeepSpeed's update only.
        let_go: The rest of a reference that has a cache, until the first micro-batch.
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
        """What is there between micro-batches."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> float:
        """At most, as if head, layer and activations were largest at once.

        A resumed run has its optimizer, but no gradients, when it lets go of the
        reference, whose forward needs less than `activations`.
        """
        within = self.head + self.layer + self.activations
        before = self.let_go - self.gradients + self.activations
        return self.resident + max(within, self.step, before)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Counts a model's weights without loading any.

    Of a layer, backward keeps per token: of two norms a float32 copy of the input, the
    normalized copy and the output; q, k, v, attention's output twice (as made, and as
    the next product reads it); gate, up, the activated gate and their product. While
    the MLP runs backward, the gradients of three of the last and of the layer's input
    and output come on top.

    Args:
        config: Of a causal language model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = next(m for m in model.base_model.modules() if is_repeated_blocks(m))
    linear = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    every, text = _numel(model), config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    dim = getattr(text, "head_dim", None) or hidden // heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    within = 4 * hidden + (3 * heads + 2 * kv) * dim + 4 * text.intermediate_size
    backward = 2 * hidden + 3 * text.intermediate_size
    return Sizes(
        all=every,
        linear=sum(m.weight.numel() for m in linear),
        lora=sum(m.in_features + m.out_features for m in linear),
        layer=max(_numel(layer) for layer in layers),
        root=every - _numel(layers),
        head=text.vocab_size * hidden,
        layers=len(layers),
        hidden=hidden,
        per_token=(within + backward, 2 * hidden),
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def memory(
    sizes: Sizes,
    engine: Engine,
    ranks: int,
    tokens: int,
    *,
    lora: int = 0,
    four_bit: bool = False,
    cached: bool = False,
    itemsize: int = 2,
    float32_root: bool = False,
    sync: bool = False,
    live: int = LIVE,
    device: str = "cuda",
) -> Memory:
    """Memory of `rl: edpo` on one of several GPUs.

    Args:
        sizes: Of the model, see `sizes_of`.
        engine: Plain data parallelism, DeepSpeed's ZeRO stages or FSDP2.
        ranks: GPUs.
        tokens: Of a micro-batch, over its chosen and rejected, padding counted.
        lora: Rank of an adapter on all linear layers; 0 trains all weights.
        four_bit: Whether those layers are in 4 bits (`adapter: qlora`).
        cached: Whether the reference has a cache (`precompute_ref_log_probs`).
        itemsize: Bytes of a weight.
        float32_root: Whether embedding and head are in float32: where all weights
            train under `ddp` and attention is `sdpa` or `eager`, axolotl has them so.
        sync: Whether FSDP2 reduces gradients after every micro-batch, as accelerate's
            `sync_each_batch` makes it; else they are whole while they accumulate.
        live: `stage3_max_live_parameters`, up to which ZeRO-3 keeps weights whole.
        device: `cuda` or `cpu`, whose tiles differ.

    Returns:
        Bytes, an upper bound for the parts that come and go.
    """
    deepspeed, sharded = engine.startswith("zero"), engine in ("zero3", "fsdp2")
    shard, full = (ranks if sharded else 1), not lora
    saved = (itemsize - NF4) * sizes.linear if four_bit else 0
    base = itemsize * sizes.all - saved + (4 - itemsize) * sizes.root * float32_root
    layer = itemsize * sizes.layer - saved / sizes.layers
    reference = base / shard if full else 0
    head = (4 if float32_root else itemsize) * sizes.head / shard
    kept = head if full and cached else reference
    width = 4 if engine == "ddp" else itemsize  # of an adapter
    trained = sizes.all if full else lora * sizes.lora
    trainable = base if full else width * trained
    copies = {"ddp": 2, "zero1": 1} | ({} if sync else {"fsdp2": 1})
    ahead = (min(sizes.all, live) - sizes.root) / sizes.layer
    whole = {
        "zero2": trainable / ranks,
        "zero3": layer * (max(1, ahead) + full),
        "fsdp2": layer * 2 * (1 + full),  # the next one is fetched meanwhile
    }
    most = SUB_GROUP if sharded else trained  # of which gradients are widened at once
    narrow, float32 = sizes.per_token
    per_token = (sizes.layers + 1) * sizes.hidden * itemsize
    per_token += narrow * itemsize + float32 * 4
    return Memory(
        weights=(base if full else base + trainable) / shard,
        gradients=trainable * copies.get(engine, 1 / ranks),
        optimizer=12 * trained / ranks if deepspeed else 2 * trainable / shard,
        reference=kept,
        head=_tiles(sizes, tokens, itemsize, device, full)
        + itemsize * _whole_head(sizes, engine, full),
        layer=whole.get(engine, 0),
        activations=tokens * per_token,
        step=4 * min(trained / ranks, most) if deepspeed else 0,
        let_go=reference - kept,
    )


def _whole_head(sizes: Sizes, engine: Engine, full: bool) -> int:
    """Values of embedding and head that are gathered, and of their gradients."""
    head, root = sizes.head * full, sizes.root
    return {
        "ddp": head,
        "zero1": head,
        "zero2": 2 * head,  # the gradient, and what is sent of it
        "zero3": root + head,  # the reference's head, then the gradient
        "fsdp2": root + max(head, 2 * root * full),  # likewise, as for zero2
    }[engine]


def _tiles(sizes: Sizes, tokens: int, itemsize: int, device: str, trains: bool) -> int:
    """Bytes the head op works in, with the hidden states it reads and their gradient.

    logprobs.py: forward has `matrices` of a tile, and, unless a head that trains is too
    large to keep its numerators, the gradient of the hidden states already. Backward of
    a head that trains has those numerators, or a tile of logits and that gradient, and
    in either case the gradient of a tile's rows.
    """
    chunk, tile, matrices = TILES[device]
    vocab = sizes.head // sizes.hidden
    cells = min(chunk, tokens) * min(tile, vocab)
    values = tokens * sizes.hidden
    gradient = 4 * min(values, BLOCK_VALUES) + itemsize * values
    kept = (itemsize if device == "cuda" else 4) * tokens * vocab * trains
    keeps = kept <= KEPT_BYTES
    forward, backward = 4 * cells * matrices, 0
    if keeps:
        forward += gradient + (kept or itemsize * cells)
    if trains:
        rows = 4 * min(tile, vocab) * sizes.hidden
        again = (4 + itemsize) * cells + gradient
        backward = rows + (kept + 3 * itemsize * values if keeps else again)
    return 2 * itemsize * values + max(forward, backward)


def main(arguments: list[str] | None = None) -> None:
    """Prints a table of GiB per GPU, a row per engine."""
    parser = argparse.ArgumentParser(prog="python -m axolotl_edpo.tools.memory")
    parser.add_argument("config", help="folder with config.json, file, or hub name")
    parser.add_argument("--ranks", type=int, default=8, help="GPUs")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all weights")
    parser.add_argument("--four-bit", action="store_true", help="QLoRA")
    parser.add_argument("--cached", action="store_true", help="precomputed reference")
    parser.add_argument("--sync-each-batch", action="store_true", help="for FSDP2")
    parser.add_argument("--engines", nargs="+", default=get_args(Engine))
    given = parser.parse_args(arguments)
    sizes = sizes_of(AutoConfig.from_pretrained(given.config))
    columns = [*Memory._fields, "total"]
    print(f"GiB per GPU, {sizes.all / 1e9:.2f} billion weights\n")
    print(" | ".join(["| engine", *columns]), "|")
    print("|---" + "|---:" * len(columns) + "|")
    for engine in given.engines:
        need = memory(
            sizes,
            engine,
            given.ranks,
            given.tokens,
            lora=given.lora,
            four_bit=given.four_bit,
            cached=given.cached,
            sync=given.sync_each_batch,
        )
        cells = (f"{value / 2**30:.1f}" for value in (*need, need.total))
        print(" | ".join([f"| {engine}", *cells]), "|")


if __name__ == "__main__":
    main()
