"""The fused op. It needs torch alone."""

from .lm_head import Head
from .token_stats import TokenStats, token_stats

__all__ = ["Head", "TokenStats", "token_stats"]
