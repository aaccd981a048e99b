"""The id of a pair: a hash of its tokens.

It does not change if the data is shuffled, split or extended. If the pair has images,
their digest is hashed, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from .columns import IDS

# Column of the digest of a pair's images; absent in data without images.
IMAGES = "edpo_images"


def digest_of(parts: Iterable[Sequence[int] | np.ndarray], images: str = "") -> bytes:
    """The id of a pair, 16 bytes.

    Args:
        parts: The tokens of prompt, of chosen and of rejected, in this order.
        images: Digest of the pair's images; empty in data without images.
    """
    digest = xxhash.xxh3_128()
    for part in parts:
        ids = np.ascontiguousarray(part, dtype=np.int64)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.data)
    digest.update(images.encode())
    return digest.digest()


def pair_digest(pair: Mapping[str, Any]) -> bytes:
    """The id of a pair, 16 bytes.

    Args:
        pair: Has `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    return digest_of((pair[name] for name in IDS), pair.get(IMAGES, ""))
