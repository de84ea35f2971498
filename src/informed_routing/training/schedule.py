"""Everything that a step depends on besides the weights, as pure functions of seed and step.

This is what makes a resumed run equal an uninterrupted one: nothing random is carried from step to step.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..config.recipe import StageConfig


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any names and numbers."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def learning_rate(config: StageConfig, step: int) -> float:
    """The rate of a step (from 0): linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def linear(start: float, end: float, step: int, steps: int) -> float:
    """Linear interpolation over the steps of a stage; the last step reaches `end`."""
    return start + (end - start) * (step / max(steps - 1, 1))


class Batches:
    """Rows of a packed text [n, L] in a new random order every epoch, dealt out to micro-batches and processes."""

    def __init__(self, rows: Tensor, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world = rank, world
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return int(self._order[place])

    def __getitem__(self, index: int) -> Tensor:
        """Micro-batch `index` of this process: [batch_size, L]."""
        first = (index * self.world + self.rank) * self.batch_size
        return self.rows[[self._row(first + i) for i in range(self.batch_size)]]
