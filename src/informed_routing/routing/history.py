"""What the units of a model have approximated of the texts of a batch so far: what a held rule owes its share to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Holding:
    """What an engine needs to decide as a held rule does: `limit + gain (share t - a) / (t + soft)` (rules/held.py)."""

    shares: tuple[float, ...]
    """Of tokens approximated, by unit."""
    gain: float
    soft: float


@dataclass
class History:
    """Counts for the `length` places that a cache holds of each text, padding included."""

    approximated: Tensor
    """int32 [units, B], on the host."""
    length: int = 0

    @classmethod
    def empty(cls, units: int, batch: int) -> History:
        """Of texts that are about to begin."""
        return cls(torch.zeros(units, batch, dtype=torch.int32))
