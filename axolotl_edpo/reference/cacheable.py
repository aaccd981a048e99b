"""Checks that a reference can be cached, and that a cache fits reference and batch."""

from collections.abc import Sequence
from typing import Any

import torch

from ..config.args import PRECOMPUTE
from ..errors import refuse
from ..models.rope import stretches_beyond
from .cache import ReferenceCache

# A relative distance between cached and computed values below this is rounding.
TOLERANCE = 0.1
# Nats per token by which log-probabilities of answers may differ.
NATS = 0.5


def require_cacheable(config: Any, reads_head: bool, max_length: int | None) -> None:
    """Refuses models that a cache of hidden states per pair cannot serve.

    Their head cannot be read, and logits are needed. Or their hidden states depend on
    the other pairs of a batch.

    Args:
        config: The model's config.
        reads_head: Whether the op can read the head, or logits are not needed.
        max_length: Sequences are truncated to so many tokens; None: never.

    Raises:
        ValueError: Names the reason and what to set.
    """
    if not reads_head:
        refuse(
            PRECOMPUTE,
            True,
            "remove it: the head of this `base_model` cannot be read, and logits over "
            "the whole vocabulary would have to be kept",
        )
    trained = stretches_beyond(config.get_text_config())
    if trained is not None and (max_length is None or max_length > trained):
        refuse(
            PRECOMPUTE,
            True,
            f"remove it, or set `sequence_len` up to {trained}: beyond that the "
            "positions of this `base_model` depend on the longest sequence of a "
            "batch",
        )


def require_in_cache(
    cache: ReferenceCache, pairs: Sequence[bytes], lengths: torch.Tensor
) -> None:
    """Refuses a batch whose scored tokens are not all in the cache.

    Args:
        cache: The reference's cache.
        pairs: Digests of the batch's pairs.
        lengths: Shape (2 x pairs,), scored tokens of all chosen, then of all rejected
            answers.

    Raises:
        ValueError: Names what is missing and what to do.
    """
    if not all(pair in cache for pair in pairs):
        raise ValueError(
            f"`{PRECOMPUTE}: true`: a pair is in no data set of the "
            f"recipe, and so not in the cache: remove `{PRECOMPUTE}`"
        )
    by_pair = [*zip(*lengths.view(2, -1).tolist(), strict=True)]
    if by_pair != [cache.lengths(pair) for pair in pairs]:
        raise ValueError(
            f"{cache.folder}: its answers are not as long as those of the "
            "batch: remove the folder, and it is computed anew"
        )


def require_equal(cache: ReferenceCache, pair: bytes, live: torch.Tensor) -> None:
    """Refuses a cache that does not hold what the reference computes.

    Args:
        cache: The reference's cache.
        pair: Digest of the pair to compare.
        live: What the reference computed for it: hidden states, shape (tokens, hidden),
            or log-probabilities of its answers, shape (2,).

    Raises:
        ValueError: If they differ from the cached ones by more than rounding.
    """
    cached, live = torch.cat(cache.read(pair)).float(), live.float().cpu()
    if live.dim() == 1:
        tokens = torch.tensor(cache.lengths(pair)).clamp(min=1)
        distance = float(((cached - live).abs() / tokens).max())
        bound, unit = NATS, "nats per token"
    else:
        distance = float((cached - live).norm() / live.norm().clamp(min=1))
        bound, unit = TOLERANCE, "of its norm"
    if not distance < bound:
        raise ValueError(
            f"{cache.folder}: what it holds is {distance:.2g} {unit} away from what "
            "this reference computes: remove the folder, and it is computed anew"
        )
