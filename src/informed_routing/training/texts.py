"""The text of a training run: packed once for each split and length, and seeded choices of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..assets import Split, load_texts, pack
from ..errors import InputError
from .reading import Reading
from .schedule import seed_of


class Texts:
    """Rows of the texts `data` (references as `load_texts` takes them)."""

    def __init__(self, data: Sequence[str], tokenizer: Any, seed: int) -> None:
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self._rows: dict[tuple[Split, int], Tensor] = {}

    def rows(self, split: Split, length: int) -> Tensor:
        """All of a split: int64 [n, length]. Raises InputError for a text that is shorter than one row.

        A text that `data` names twice has twice the weight in training; elsewhere it would only be read twice.
        """
        if (split, length) not in self._rows:
            data = self.data if split == "train" else dict.fromkeys(self.data)
            self._rows[split, length] = pack(load_texts(list(data), split), self.tokenizer, length)
        return self._rows[split, length]

    def packed(self) -> list[tuple[tuple[Split, int], Tensor]]:
        """What has been read so far: (split, length) and its rows, in a fixed order."""
        return sorted(self._rows.items(), key=lambda item: item[0])

    def read(self, reading: Reading) -> Tensor:
        """The rows that a stage reads, int64 [n, length]: as many as it chooses, in its order."""
        rows = self.rows(reading.split, reading.length)
        if not reading.order:
            return rows[: reading.rows]
        if reading.even and len(set(self.data)) > 1:
            return self._evenly(reading)
        return rows[self._order(len(rows), reading.order)[: reading.rows]]

    def _order(self, count: int, name: str) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(self.seed, name)))

    def _evenly(self, reading: Reading) -> Tensor:
        """Rows of the texts in turns, each text's in a random order, until there are enough or none is left."""
        texts = [rows[self._order(len(rows), f"{reading.order} {i}")] for i, rows in enumerate(self._apart(reading))]
        turns = sorted((turn, i) for i, rows in enumerate(texts) for turn in range(len(rows)))
        return torch.stack([texts[i][turn] for turn, i in turns[: reading.rows]])

    def _apart(self, reading: Reading) -> list[Tensor]:
        """Rows [n, length] of each text; one that fills no row goes with the next ones, until they do."""
        found: list[Tensor] = []
        waiting: list[str] = []
        for name in dict.fromkeys(self.data):
            waiting += load_texts([name], reading.split)
            try:
                found.append(pack(waiting, self.tokenizer, reading.length))
            except InputError:
                continue
            waiting = []
        return found

    def some(self, split: Split, length: int, tokens: int, name: str) -> Tensor:
        """A random choice of rows worth `tokens` tokens, one at least; `name` and the seed decide which."""
        return self.read(Reading.once(split, length, tokens, name))
