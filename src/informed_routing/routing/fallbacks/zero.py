"""Nothing is added: greedy routing (SkipGPT, MoD, D-LLM)."""

from __future__ import annotations

from ...config.parts import ForecasterConfig
from .base import Fallback


class ZeroFallback(Fallback):
    """An update of zero, which takes no module."""

    @classmethod
    def make(cls, config: ForecasterConfig, hidden_size: int) -> None:
        return None


KIND = ZeroFallback
