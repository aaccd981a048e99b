"""The id of a pair: a hash of its tokens.

It does not change if the data is shuffled, split or extended.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from .columns import IDS


def digest_of(parts: Iterable[Sequence[int] | np.ndarray]) -> bytes:
    """The id of a pair, 16 bytes.

    Args:
        parts: The tokens of prompt, of chosen and of rejected, in this order.
    """
    digest = xxhash.xxh3_128()
    for part in parts:
        ids = np.ascontiguousarray(part, dtype=np.int64)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.data)
    return digest.digest()


def pair_digest(pair: Mapping[str, Any]) -> bytes:
    """The id of a pair, 16 bytes.

    Args:
        pair: Has `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """
    return digest_of(pair[name] for name in IDS)
