"""Layers of the GPU engine's KV cache: fixed room that is written in place, so that recorded graphs stay valid."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..kv_layers import EngineLayer

BLOCK = 256
"""Capacities are multiples of this."""


class RoomLayer(EngineLayer):
    """Keys and values [B, kv_heads, capacity, head_dim]; the first `length` places are real."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape = (heads, head_dim)
        self.dtype, self.device = dtype, device

    @property
    def capacity(self) -> int:
        """Keys that there is room for."""
        return self.keys.shape[2] if self.is_initialized and self.keys is not None else 0

    def reserve(self, batch: int, length: int) -> None:
        """Make room for `length` keys; what is stored stays. Growing doubles: it moves the cache and costs a graph."""
        if self.capacity >= length:
            return
        room = max(-(-length // BLOCK) * BLOCK, 2 * self.capacity)
        heads, head_dim = self.shape
        old = (self.keys, self.values) if self.length else ()
        # Zeros, since a masked key weighs nothing but must be a number.
        self.keys, self.values = (
            torch.zeros(batch, heads, room, head_dim, dtype=self.dtype, device=self.device) for _ in range(2)
        )
        for before, now in zip(old, (self.keys, self.values), strict=False):
            if before is not None:
                now[:, :, : self.length] = before[:, :, : self.length]
        self.is_initialized = True

    def take(self, keys: Tensor, values: Tensor) -> None:
        batch, _, length, _ = keys.shape
        self.reserve(batch, length + 1)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, :length] = keys
        self.values[:, :, :length] = values
        self.length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other sequences, in place: recorded graphs read these very addresses."""
        if self.length and self.keys is not None and self.values is not None:
            for part in (self.keys, self.values):
                part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def plain(self) -> DynamicLayer:
        layer = DynamicLayer()
        if self.length and self.keys is not None and self.values is not None:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys = self.keys[:, :, : self.length].contiguous()
            layer.values = self.values[:, :, : self.length].contiguous()
        return layer
