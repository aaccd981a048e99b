"""Vision-language models that train in a second, and pairs with drawn images."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from helpers import tiny

# Writes a message that is a text, or a list of texts and images.
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT = dict(tiny.SIZES, initializer_range=0.15)
TOWER = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
SIZE = {"height": 16, "width": 16}


def _tokenizer(tokens: list[str], image: str) -> Any:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", image)
    return tokenizer


def _gemma3() -> tuple[Any, Any]:
    marks = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    named = dict(zip(("boi_token", "eoi_token", "image_token"), marks, strict=True))
    tokenizer = _tokenizer(marks, marks[0])
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template,
        extra_special_tokens=named,
        **tiny.SPECIAL,
    )
    images = Gemma3ImageProcessorPil(size=SIZE)
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4)
    text = {**TEXT, "vocab_size": len(tokenizer), "sliding_window": 64}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={**TOWER, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return config, processor


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer(["<image>"], "<image>")
    images = LlavaImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=SIZE, do_pad=False
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    config = AutoConfig.for_model(
        "llava",
        text_config={**TEXT, "vocab_size": len(tokenizer), "model_type": "llama"},
        vision_config={**TOWER, "model_type": "siglip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return config, processor


def _idefics3() -> tuple[Any, Any]:
    around, image, whole = "<fake_token_around_image>", "<image>", "<global-img>"
    tokenizer = _tokenizer([around, image, whole, "<end_of_utterance>"], image)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = AutoConfig.for_model(
        "idefics3",
        text_config={**TEXT, "vocab_size": len(tokenizer), "model_type": "llama"},
        vision_config=TOWER,
        image_token_id=tokenizer.convert_tokens_to_ids(image),
        scale_factor=2,
        pad_token_id=2,
    )
    return config, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "idefics3": _idefics3,
}


def save_model(folder: Path, kind: str) -> Path:
    """Saves a random vision-language model with its processor.

    Args:
        folder: Where to.
        kind: One of FAMILIES.

    Returns:
        The folder, for `base_model`.
    """
    torch.manual_seed(0)
    config, processor = FAMILIES[kind]()
    processor.chat_template = processor.tokenizer.chat_template
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def draw(path: Path, rng: random.Random) -> Path:
    """Draws a picture of coloured squares, of another size each time."""
    cells = rng.choice([(2, 2), (3, 2), (2, 4)])
    image = Image.new("RGB", cells)
    for x in range(cells[0]):
        for y in range(cells[1]):
            image.putpixel((x, y), tuple(rng.randrange(256) for _ in range(3)))
    image.resize((cells[0] * 12, cells[1] * 12), Image.NEAREST).save(path)
    return path


def save_pairs(folder: Path, count: int, images: list[int], seed: int = 0) -> Path:
    """Writes random pairs with images.

    Args:
        folder: Where to; it gets `pairs.jsonl` and the images.
        count: Number of pairs.
        images: Numbers of images of a pair, used in turn.
        seed: Of texts and images.

    Returns:
        The file of the pairs.
    """
    rng = random.Random(seed)
    words = "red blue small big cat dog runs sleeps well today".split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for number in range(count):
            names = [
                str(draw(folder / f"{seed}-{number}-{i}.png", rng))
                for i in range(images[number % len(images)])
            ]
            row = {
                "messages": [{"role": "user", "content": text(2, 6)}],
                "chosen": {"role": "assistant", "content": text(2, 8)},
                "rejected": {"role": "assistant", "content": text(2, 8)},
                "images": names,
            }
            file.write(json.dumps(row) + "\n")
    return path
