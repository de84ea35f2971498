"""Whether routing a unit's call pays on this GPU: what calls cost is timed once and kept, not guessed.

With few rows a unit's weights are read if any row executes, so a routed call of many sequences saves little and costs
its own launches. A price is timed for each unit kind, for decode and prefill, and each power of two of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from ...assets.cache import read_record, write_record
from ..kernels.tiles import bucket

UNION = 256
"""Up to this many rows a call reads all of a unit's weights as soon as one row executes."""
MOST_ROWS = 4096
"""Rows above which the price of a row changes no more."""
UNKNOWN_SHARE = 0.75
"""Executed share that is assumed where no calibrated table says what a threshold means."""
MARGIN = 1.02
"""A saving below this is left alone: it is of the size of what is not modelled."""


@dataclass(frozen=True)
class Price:
    """Seconds of one unit's call: `whole` without routing, and routed with none and with all of its rows executing."""

    whole: float
    none: float
    all: float

    def routed(self, rows: int, share: float) -> float:
        """Expected seconds of a routed call whose rows execute with probability `share`, one by one."""
        if rows > UNION:
            return self.none + share * (self.all - self.none)
        nobody = (1 - share) ** rows
        return nobody * self.none + (1 - nobody) * self.all

    def pays(self, rows: int, share: float) -> bool:
        """Whether a routed call is expected to be clearly faster than one that executes all rows."""
        return self.routed(rows, share) * MARGIN < self.whole


class PriceBook:
    """Prices of one engine, read from `path` and added to it. `identity` names device, model shape and format."""

    def __init__(self, identity: str, path: Path) -> None:
        self.identity, self.path = identity, path
        self._prices = {key: Price(**price) for key, price in _read(path).items()}

    def _key(self, kind: int, rows: int, decode: bool) -> str:
        size = bucket(min(rows, MOST_ROWS))
        return f"{self.identity}|{('attention', 'ffn')[kind]}|{'decode' if decode else 'prefill'}|{size}"

    def find(self, kind: int, rows: int, decode: bool) -> Price | None:
        """The price of a call of so many rows of a unit kind (0 or 1); None where it was not timed."""
        return self._prices.get(self._key(kind, rows, decode))

    def complete(self, rows: int, decode: bool, time: Callable[[int], Price]) -> None:
        """Time what is missing for calls of so many rows; `time` gives the price of a unit kind (0 or 1)."""
        missing = [kind for kind in (0, 1) if self.find(kind, rows, decode) is None]
        for kind in missing:
            self._prices[self._key(kind, rows, decode)] = time(kind)
        if missing:
            stored = {**_read(self.path), **{key: asdict(price) for key, price in self._prices.items()}}
            write_record(self.path, stored)


def rounds_up(price: Price | None, kind: int, rows: int, share: float) -> bool:
    """Whether a unit (0 attention, 1 FFN) should execute all rows of a call, whatever its router would say.

    Without a price (another device than a GPU) the rule of thumb: an FFN's weights are nearly always read for some
    row of a small batch.
    """
    if price is None:
        return kind == 1 and 1 < rows <= UNION
    return not price.pays(rows, share)


def executed_shares(thresholds: Sequence[Any], value: float) -> tuple[float, float]:
    """Shares of attention and FFN units that execute at a margin threshold, by the calibrated table (ThresholdRow)."""
    rows = sorted(thresholds, key=lambda row: row.threshold)
    if not rows:
        return UNKNOWN_SHARE, UNKNOWN_SHARE
    marks = [row.threshold for row in rows]
    attention, ffn = (
        1 - float(numpy.interp(value, marks, [getattr(row, kind) for row in rows])) for kind in ("attention", "ffn")
    )
    return attention, ffn


def _read(path: Path) -> dict[str, Any]:
    return read_record(path) or {}
