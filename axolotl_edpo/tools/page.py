"""The lines that `axolotl edpo-memory` prints, for a terminal of 80 columns."""

import textwrap
from collections.abc import Iterator, Mapping

from .changes import changes
from .memory import Arguments, Phase
from .recipe_memory import RecipeMemory

GIB = 2**30
COLUMNS = 80
# Memory of common GPUs, taken as GiB.
CARDS = (16, 24, 40, 48, 80, 141)
# A card is tight if less than this share of it would be free.
ROOM = 0.1
ENGINES = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
PEAK: Mapping[Phase, str] = {
    "micro-batch": "in a micro-batch: weights to activations",
    "step": "in the optimizer step: weights to reference, and step",
    "start": "before step 1: all but gradients, head, layer, step",
}
NOT_COUNTED = (
    "Not counted: CUDA's context, fragmentation, buffers of NCCL and DeepSpeed. On one "
    "H100 six runs took 10 % less to 5 % more than calculated."
)


def lines(recipe: RecipeMemory) -> list[str]:
    """All lines.

    Args:
        recipe: The memory of a recipe.
    """
    arguments = recipe.arguments
    peak = arguments.memory.total / GIB
    return [
        *_wrapped(_model(recipe)),
        _engine(recipe),
        _tokens(recipe),
        "",
        "GiB per GPU",
        *_parts(arguments),
        *_notes(recipe),
        "",
        *(_card(card, peak) for card in CARDS),
        *_changes(recipe, peak),
        "",
        *_wrapped(NOT_COUNTED),
    ]


def fits(card: float, peak: float) -> str:
    """Whether a card has room.

    Args:
        card: Memory of the card, GiB.
        peak: Peak that is calculated, GiB.

    Returns:
        `fits`, `tight` or `does not fit`.
    """
    if peak > card:
        return "does not fit"
    return "tight" if card - peak < ROOM * card else "fits"


def _notes(recipe: RecipeMemory) -> Iterator[str]:
    if recipe.notes:
        yield ""
    for note in recipe.notes:
        yield from _wrapped(note)


def _model(recipe: RecipeMemory) -> str:
    arguments = recipe.arguments
    bits = 4 if arguments.four_bit else 8 * arguments.itemsize
    trains = "all train"
    if arguments.lora:
        adapter = arguments.lora * arguments.sizes.lora
        trains = f"LoRA of rank {arguments.lora} trains {_count(adapter)}"
    count = _count(arguments.sizes.all)
    return f"{recipe.model}: {count} weights in {bits} bits, {trains}"


def _count(values: int) -> str:
    if values >= 10**9:
        return f"{values / 10**9:.2f} billion"
    return f"{values / 10**6:.1f} million"


def _engine(recipe: RecipeMemory) -> str:
    arguments = recipe.arguments
    ranks, name = arguments.ranks, ENGINES[arguments.engine]
    gpus = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
    if arguments.engine == "fsdp2" and arguments.replicas > 1:
        gpus += f", {arguments.replicas} replicas"
    alone = ranks == 1 and arguments.engine == "ddp"
    assumed = " (assumed: --gpus sets their number)" if recipe.assumed else ""
    return f"{'One process' if alone else name} on {gpus}{assumed}"


def _tokens(recipe: RecipeMemory) -> str:
    tokens, ranks = recipe.arguments.tokens, recipe.arguments.context
    divided = f", on {ranks} GPUs" if ranks > 1 else ""
    if recipe.given:
        return f"{tokens} tokens in a micro-batch{divided}"
    pairs = "1 pair" if recipe.pairs == 1 else f"{recipe.pairs} pairs"
    product = f"{pairs} x 2 answers x {recipe.length}"
    return f"At most {product} = {tokens} tokens in a micro-batch (--tokens){divided}"


def _parts(arguments: Arguments) -> Iterator[str]:
    """A row per part that takes memory, and the peak."""
    need = arguments.memory
    texts = _texts(arguments)
    for part, value in need._asdict().items():
        if part == "reference" or f"{value / GIB:.1f}" != "0.0":
            yield _row(part.replace("_", " "), value, texts[part])
    phase = max(need.phases, key=lambda name: need.phases[name])
    yield _row("peak", need.total, PEAK[phase])


def _row(part: str, value: float, text: str) -> str:
    return f"  {part:11} {value / GIB:7.1f}  {text}"


def _texts(arguments: Arguments) -> dict[str, str]:
    """What each part of `Memory` is."""
    engine, full = arguments.engine, not arguments.lora
    shards, sharded = engine in ("zero3", "fsdp2"), ", sharded"
    copies = ", and weights in 32 bits" * engine.startswith("zero")
    return {
        "weights": ("the policy" if full else "model and adapter") + sharded * shards,
        "gradients": _gradients(arguments),
        "optimizer": f"two moments of AdamW{copies}" + sharded * (engine != "ddp"),
        "reference": _reference(arguments) + sharded * (shards and full),
        "head": "tiles of logits"
        + ", the head's gradient" * full
        + ", the gathered head" * shards,
        "layer": "gathered layers" if shards else "gradients of one micro-batch",
        "activations": "inputs of all layers, and all that one layer keeps",
        "step": "gradients in 32 bits, in the optimizer step only, sharded",
        "let_go": "the rest of the reference, while its cache is filled",
    }


def _gradients(arguments: Arguments) -> str:
    engine, between = arguments.engine, "that accumulate between micro-batches"
    if engine == "fsdp2" and not arguments.sync:
        return "whole, without `sync_each_batch`"
    if engine in ("zero2", "zero3", "fsdp2"):
        return f"{between}, sharded"
    buckets = engine == "ddp" and arguments.ranks > 1
    return between + ", and DDP's buckets" * buckets


def _reference(arguments: Arguments) -> str:
    if arguments.reference_free:
        return "none: the loss has no reference"
    if arguments.lora:
        return "none: it is the model with its adapter off"
    if not arguments.cached:
        return "a second model"
    return "nothing but its cache" if arguments.two_numbers else "its head"


def _card(card: int, peak: float) -> str:
    room = f"{card - peak:5.1f} GiB free"
    if peak > card:
        room = f"{peak - card:5.1f} GiB too much"
    return f"  {card:>3} GB  {fits(card, peak):12}  {room}"


def _changes(recipe: RecipeMemory, peak: float) -> Iterator[str]:
    """What to change, if a card is too small."""
    if all(fits(card, peak) == "fits" for card in CARDS):
        return
    yield from ("", "What to change: each alone, its peak, the smallest card it fits")
    for change in changes(recipe):
        then = change.peak / GIB
        card = next((f"{c} GB" for c in CARDS if fits(c, then) == "fits"), "none")
        yield from _wrapped(f"  {then:6.1f}  {card:>6}  {change.keys}", 18)


def _wrapped(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        text,
        COLUMNS,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
