"""The text of a training run: packed once for each split and length, and seeded choices of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..assets import load_texts, pack
from .schedule import seed_of


class Texts:
    """Rows of the texts `data` (references as `load_texts` takes them)."""

    def __init__(self, data: Sequence[str], tokenizer: Any, seed: int) -> None:
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self._rows: dict[tuple[str, int], Tensor] = {}

    def rows(self, split: str, length: int) -> Tensor:
        """All of a split: int64 [n, length].

        A text that `data` names twice has twice the weight in training; elsewhere it would only be read twice.
        """
        if (split, length) not in self._rows:
            data = self.data if split == "train" else dict.fromkeys(self.data)
            self._rows[split, length] = pack(load_texts(list(data), split), self.tokenizer, length)  # type: ignore[arg-type]
        return self._rows[split, length]

    def packed(self) -> list[tuple[tuple[str, int], Tensor]]:
        """What has been read so far: (split, length) and its rows, in a fixed order."""
        return sorted(self._rows.items(), key=lambda item: item[0])

    def some(self, split: str, length: int, tokens: int, name: str) -> Tensor:
        """A random choice of rows worth `tokens` tokens; `name` and the seed decide which."""
        rows = self.rows(split, length)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed_of(self.seed, name)))
        return rows[order[: max(tokens // length, 1)]]
