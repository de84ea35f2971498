"""Layers of the CPU engine's KV cache, with keys in the panels that it reads."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..kv_layers import EngineLayer
from .interface import KEY_BLOCK


class PackedLayer(EngineLayer):
    """Keys [B, heads, S / panel, head_dim, panel] and values [B, heads, S, head_dim]; the first `length` are real."""

    def __init__(self, heads: int, head_dim: int, panel: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (heads, head_dim, panel)
        self.dtype, self.device = dtype, torch.device("cpu")

    def has_room(self, length: int) -> bool:
        """Whether `length` keys fit."""
        return self.is_initialized and self.values is not None and self.values.shape[2] >= length

    def reserve(self, batch: int, length: int) -> None:
        """Make room for `length` keys; what is stored stays. Unused room is zero, so that masked keys weigh nothing."""
        heads, head_dim, panel = self.shape
        old_keys, old_values = self.keys, self.values
        if self.has_room(length):
            return
        room = -(-length // KEY_BLOCK) * KEY_BLOCK  # keys are read in whole blocks
        if self.length:
            room = max(room, -(-(self.length * 3 // 2) // KEY_BLOCK) * KEY_BLOCK)  # growing copies: do it seldom
        self.keys = torch.zeros(batch, heads, room // panel, head_dim, panel, dtype=self.dtype)
        self.values = torch.zeros(batch, heads, room, head_dim, dtype=self.dtype)
        if self.length and old_keys is not None and old_values is not None:
            self.keys[:, :, : old_keys.shape[2]] = old_keys
            self.values[:, :, : old_values.shape[2]] = old_values
        self.is_initialized = True

    def take(self, keys: Tensor, values: Tensor) -> None:
        batch, _, length, _ = keys.shape
        self.reserve(batch, length + 1)
        assert self.keys is not None
        assert self.values is not None
        heads, head_dim, panel = self.shape
        rows = torch.zeros_like(self.values)
        rows[:, :, :length] = keys
        self.keys.copy_(rows.view(batch, heads, -1, panel, head_dim).transpose(3, 4))
        self.values[:, :, :length] = values
        self.length = length

    def plain(self) -> DynamicLayer:
        layer = DynamicLayer()
        if self.length and self.keys is not None and self.values is not None:
            heads, head_dim, _ = self.shape
            keys = self.keys.transpose(3, 4).reshape(self.keys.shape[0], heads, -1, head_dim)
            layer.lazy_initialization(keys, self.values)
            layer.keys = keys[:, :, : self.length].contiguous()
            layer.values = self.values[:, :, : self.length].contiguous()
        return layer
