"""A KV cache that keeps only the tokens that executed attention: really smaller, not only masked (kv='drop')."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..models.calls import length_after_crop


class ExecutedKeysLayer(DynamicLayer):
    """Keys and values [B, heads, S, head_dim] of executed tokens, with their place in the sequence.

    Sequences of a batch may execute different tokens; the shorter ones are filled up with rows whose place is -1.
    """

    is_croppable = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = 0
        self.places: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add [B, heads, S, head_dim] rows at `places` [B, S] (-1: filler); returns all that is stored."""
        if not self.is_initialized or self.keys is None or self.places is None:
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.places = keys, values, places
        elif places.shape[1]:
            assert self.values is not None
            self.keys = torch.cat([self.keys, keys], dim=-2)
            self.values = torch.cat([self.values, values], dim=-2)
            self.places = torch.cat([self.places, places], dim=-1)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values, self.places

    def get_seq_length(self) -> int:
        """Tokens seen, also those that left no key: positions and masks count them."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens: those of them that left keys, and that they were seen."""
        self.seen = length_after_crop(self.seen, tokens_to_remove)
        if self.places is None or self.keys is None or self.values is None:
            return
        self.places = torch.where(self.places < self.seen, self.places, -1)
        stored = (self.places >= 0).any(0).nonzero()
        room = int(stored.max()) + 1 if len(stored) else 0
        self.places = self.places[:, :room]
        self.keys, self.values = self.keys[:, :, :room], self.values[:, :, :room]

    def reset(self) -> None:
        super().reset()
        self.seen, self.places = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.places is not None and self.keys is not None and self.values is not None:
            rows = beam_idx.to(self.places.device)
            self.keys = self.keys.index_select(0, rows)
            self.values = self.values.index_select(0, rows)
            self.places = self.places.index_select(0, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.places is not None and self.keys is not None and self.values is not None:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)
            self.places = self.places.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


def keep_executed_only(cache: Cache, num_layers: int) -> None:
    """Turn an empty dynamic cache, in place, into one that stores executed tokens only."""
    if not all(isinstance(layer, ExecutedKeysLayer) for layer in cache.layers) or not cache.layers:
        cache.layers = [ExecutedKeysLayer() for _ in range(num_layers)]
