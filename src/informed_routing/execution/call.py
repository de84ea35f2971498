"""What a native engine is, and what it is asked."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..routing.state import RoutingState

Policy = Literal["exact", "auto"]
"""exact: always as the routers say, so that the same tokens give the same text; auto: a unit's whole call is executed
where that is faster than skipping some of it by prices timed on this machine, so that texts may differ between runs."""


@dataclass
class Rows:
    """Where the real tokens of a batch are: first visible key per sequence, and padding of this call, if any."""

    start: Tensor
    """[B] int32, on the host."""
    valid: Tensor | None
    """[B, N] uint8, on the host; None when all are real."""

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


class NativeEngine(Protocol):
    """An engine of one routed model that does whole forwards."""

    def is_of(self, model: Any, *, sample: bool = False) -> bool:
        """Whether the model's weights are still those that the engine has copied. `sample`: look at some only."""
        ...

    def checked(self, layers: int) -> AbstractContextManager[None]:
        """Run no more than some layers, and exactly as the routers say: for checks."""
        ...

    def leaves_to_torch(self, rows: int) -> bool:
        """Whether a torch back end should do a call of so many rows."""
        ...

    def forward(
        self,
        embeddings: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: Rows,
        cache: Cache | None,
        state: RoutingState,
        stats: Any,
        *,
        keep: int = 0,
        forced: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, keep, vocabulary] of the last `keep` positions, or normed hidden states [B, N, d]."""
        ...
