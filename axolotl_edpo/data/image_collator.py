"""`ImagePairCollator`: batches of pairs with images, a row per sequence.

TRL's collator reads images and text with the model's processor. Rows are padded: the
processor decides how many tokens an image has, and images may see one another.
"""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from trl.data_utils import is_conversational
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from .collator import padded_batch
from .images import digest_of_images, loaded
from .layout import Batch
from .pair_id import IMAGES

# Side of the blank image of a batch without images, in pixels.
BLANK = 56


@dataclass
class ImagePairCollator(DataCollatorForVisionPreference):
    """Lays out pairs with images as batches for the model.

    Attributes:
        normalizer: axolotl's, which reads and resizes images.
    """

    normalizer: Any = None

    def torch_call(self, examples: list[dict[str, Any]]) -> Batch:  # type: ignore[override]
        """Lays out one micro-batch.

        A batch without images gets one more pair, with a blank image. It is not scored,
        but some engines need every rank to run the vision tower.

        Args:
            examples: Pairs of the data set, with texts or messages and with images.

        Returns:
            The entries of a padded `Batch`, and `images`.

        Raises:
            ValueError: If an image is not that which was there when the data were
                prepared.
        """
        rows = [self._loaded(example) for example in examples]
        if not any(row["images"] for row in rows):
            rows.append(self._blank(bool(rows) and is_conversational(rows[0])))
        return padded_batch(super().torch_call(rows), examples)

    def _loaded(self, example: dict[str, Any]) -> dict[str, Any]:
        row = loaded(self.normalizer, example)
        if digest_of_images(row["images"], self.processor) != example[IMAGES]:
            raise ValueError(
                "an image of a pair, or the processor, changed since the data were "
                f"prepared: {_names(example)}: remove the folder "
                "`dataset_prepared_path`, and start again"
            )
        return row

    def _blank(self, conversational: bool) -> dict[str, Any]:
        """A pair with a blank image, with messages or with texts."""
        image = Image.new("RGB", (BLANK, BLANK))
        if not conversational:
            place: Any = self.processor
            texts = {"prompt": place.image_token, "chosen": ".", "rejected": "."}
            return {**texts, "images": [image]}
        answer = [{"role": "assistant", "content": "."}]
        question = [{"role": "user", "content": "."}]
        pair = {"prompt": question, "chosen": answer, "rejected": answer}
        return {**pair, "images": [image]}


def _names(example: dict[str, Any]) -> str:
    """Quotes the images of a pair, if they are files, or how its prompt begins."""
    images = example.get("images") or [example.get("image")]
    files = [image for image in images if isinstance(image, str)]
    return ", ".join(files) or repr(str(example["prompt"])[:60])
