"""RoPE whose frequencies depend on the longest sequence of a batch."""

import re
from typing import Any

_STRETCHES = re.compile("dynamic|longrope")


def stretches_beyond(config: Any) -> int | None:
    """Length beyond which RoPE depends on the longest sequence; None: it never does."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [kind for kind in rope.values() if isinstance(kind, dict)]
    lengths = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in (rope, *by_layer)
        if _STRETCHES.search(kind.get("rope_type") or "")
    ]
    return min(lengths, default=None)
