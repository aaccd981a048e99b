"""Pairs with images: their tokens and their digest, before training and in training.

axolotl and TRL read images and tokenize their pairs when a batch is made. Here every
pair is tokenized once before a model is loaded, by the same collator, so that all
checks hold for it. The digest tells in training whether an image is still the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import xxhash
from datasets import Dataset
from jinja2 import TemplateError
from trl.data_utils import (
    apply_chat_template,
    is_conversational,
    prepare_multimodal_messages,
)

from .columns import IDS
from .conversation import ANSWERS, Conversation, PairError
from .pair_id import IMAGES
from .rendering import ChatTemplate, left_out, render_pair

# Columns from which axolotl and TRL infer that a data set has images.
COLUMNS = ("image", "images")
# Columns that TRL's collator reads. It would fail with others that it knows.
INPUTS = ("prompt", "chosen", "rejected", *COLUMNS, "chat_template_kwargs")
# Longest side of a thumbnail, in pixels.
THUMBNAIL = 128
# What images, processors and chat templates raise if something is wrong with a row.
ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    TemplateError,
)


def has_images(data: Dataset | Mapping[str, Any]) -> bool:
    """Whether a data set, or a row of it, has a column of images."""
    names = data.column_names if isinstance(data, Dataset) else data
    return any(name in names for name in COLUMNS)


def loaded(normalizer: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as TRL's collator takes it, with the images read.

    Args:
        normalizer: axolotl's, which reads and resizes images.
        row: A row of a data set, with INPUTS and other columns.

    Returns:
        A new row, in which `images` is a list of images of PIL.
    """
    inputs = {name: row[name] for name in INPUTS if row.get(name) is not None}
    return normalizer.normalize(inputs)


def digest_of_images(images: list[Any], processor: Any) -> str:
    """A digest of images and of how a processor turns them into the model's inputs.

    Args:
        images: Images of PIL.
        processor: The recipe's processor.

    Returns:
        32 hexadecimal digits.
    """
    settings = processor.image_processor.to_dict()
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = xxhash.xxh3_128(text.encode())
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def thumbnails(normalizer: Any, row: Mapping[str, Any]) -> list[bytes]:
    """Small copies of the images of a pair, as PNG files.

    Args:
        normalizer: axolotl's, which reads and resizes images.
        row: A row of a data set with images.
    """
    files = []
    for image in loaded(normalizer, row)["images"]:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.convert("RGB").save(file := BytesIO(), "PNG")
        files.append(file.getvalue())
    return files


@dataclass(frozen=True)
class ImageTokens:
    """Tokenizes a pair with images as the collator of axolotl does in training.

    Attributes:
        collator: axolotl's, which truncates nothing.
        keywords: `chat_template_kwargs` of the recipe.
    """

    collator: Any
    keywords: Mapping[str, Any]

    def columns(
        self, row: Mapping[str, Any], talk: Conversation | None
    ) -> tuple[dict[str, Any], list[str]]:
        """The columns that a pair gets: its tokens and the digest of its images.

        Args:
            row: The pair, with its images.
            talk: Its messages; None if its texts are rendered already.

        Returns:
            The columns, and what of the messages the template leaves out.

        Raises:
            PairError: If the collator cannot make a batch of the pair, or would make
                another one than the text says.
        """
        try:
            example = loaded(self.collator.normalizer, row)
            missing = [] if talk is None else self._left_out(talk, example)
            if is_conversational(example):
                example |= _texts(example, self.collator.processor)
            self._require_boundary(example)
            tokens = self._tokens(example)
        except PairError:
            raise
        except ERRORS as error:
            raise PairError(
                f"its images and its text do not fit: {type(error).__name__}: {error}: "
                "see `images`, the chat template and the processor"
            ) from error
        images = digest_of_images(example["images"], self.collator.processor)
        return {**tokens, IMAGES: images}, missing

    def _left_out(self, talk: Conversation, example: Mapping[str, Any]) -> list[str]:
        """Names messages that the template leaves out; refuses a left-out answer."""
        context = prepare_multimodal_messages(example["prompt"], example["images"])
        answers = prepare_multimodal_messages([*talk.answers])
        parts = replace(talk, context=context, answers=(answers[0], answers[1]))
        template = ChatTemplate(self.collator.processor, None, self.keywords)
        return [*left_out(parts, render_pair(template, parts))]

    def _require_boundary(self, example: Mapping[str, Any]) -> None:
        """Refuses a prompt whose end the tokenizer would merge with an answer."""

        def tokens(text: str) -> list[int]:
            tokenizer = self.collator.processor.tokenizer
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        prompt = example["prompt"]
        for name in ANSWERS:
            whole = tokens(prompt + example[name])
            if whole != tokens(prompt) + tokens(example[name]):
                raise PairError(
                    f"the tokenizer merges the end of the prompt, {prompt[-9:]!r}, "
                    f"with `{name}`, and TRL would cut it there: set another "
                    "`chat_template`"
                )

    def _tokens(self, example: Mapping[str, Any]) -> dict[str, list[int]]:
        batch = self.collator.torch_call([dict(example)])
        kept, answer = batch["attention_mask"].bool(), batch["completion_mask"].bool()
        chosen, rejected = batch["input_ids"]
        parts = (
            chosen[kept[0] & ~answer[0]],
            chosen[answer[0]],
            rejected[answer[1]],
        )
        return {name: part.tolist() for name, part in zip(IDS, parts, strict=True)}


def _texts(example: Mapping[str, Any], processor: Any) -> dict[str, str]:
    """The texts that TRL's collator makes of messages."""
    images = example["images"]
    parts = {
        "prompt": prepare_multimodal_messages(example["prompt"], images=images),
        **{name: prepare_multimodal_messages(example[name]) for name in ANSWERS},
    }
    return apply_chat_template({**example, **parts}, processor)
