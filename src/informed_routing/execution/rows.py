"""Where the real tokens of a call are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rows:
    """Where the real tokens of a batch are: first visible key per sequence, and padding of this call, if any."""

    start: Tensor
    """[B] int32, on the host."""
    valid: Tensor | None
    """[B, N] uint8, on the host; None when all are real."""

    def contexts(self, past: int, length: int) -> Tensor:
        """Keys that each of the `length` tokens after `past` sees, itself included: [B, N] int64, 0 for padding."""
        seen = torch.arange(past + 1, past + 1 + length)[None] - self.start.long()[:, None]
        return seen if self.valid is None else seen * self.valid

    @classmethod
    def from_mask(cls, mask: Tensor | None, batch: int, length: int) -> Rows | None:
        """None when the mask [B, past + N] has holes, which the engines do not do."""
        if mask is None or bool(mask.all()):
            return cls(torch.zeros(batch, dtype=torch.int32), None)
        real = mask.bool().cpu()
        start = real.int().argmax(1)
        seen = torch.arange(real.shape[1])[None] >= start[:, None]
        gaps = seen & ~real
        if bool(gaps[:, : real.shape[1] - length].any()):
            return None
        new = real[:, -length:]
        if bool((gaps[:, -length:-1] & new[:, 1:]).any()):
            return None
        return cls(start.int(), None if bool(new.all()) else new.to(torch.uint8).contiguous())
