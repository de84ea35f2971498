"""Pruned models against routing at equal MACs and at equal latency, since equal nominal sparsity saves unequal amounts.

A pruned model stands at what it saves; the routed method's numbers there are read off the curve through its own cells,
which begins at the dense model: perplexity log-linear, accuracy linear. Nothing is read beyond its last cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from . import results
from .results import Entry, Value
from .tables import Block, Column, Content, Row, Table

Saved = Callable[[Entry], float | None]
Point = tuple[float, float]

COLUMNS = (
    Column("saved", "saved %", digits=1),
    Column("wikitext", "WT2 word PPL"),
    Column("wikitext_routed", "routed there"),
    Column("average", "AVG"),
    Column("average_routed", "routed there"),
)


def trade_off(grid: str, found: Sequence[Entry], routed: str = "informed", recovered: bool = True) -> Table | None:
    """Each pruned model of a grid beside the routed method at the same saving; None where one of the two is missing."""
    blocks = []
    for model in dict.fromkeys(entry.model for entry in found):
        own = [entry for entry in found if entry.model == model and entry.records]
        curve = [e for e in own if e.kind == "dense" or (e.method, e.recovered) == (routed, recovered)]
        pruned = [entry for entry in own if entry.kind == "static" and entry.recovered == recovered]
        for title, saved in _MEASURES:
            rows = [_row(entry, curve, saved) for entry in pruned if saved(entry) is not None]
            if rows and len(curve) > 1:
                blocks.append(Block(f"{model}, at equal {title}", tuple(rows), model))
    if not blocks:
        return None
    name = next(entry.name for entry in found if (entry.method, entry.recovered) == (routed, recovered))
    notes = (
        f"'Routed there' is {name}, read off the curve through the dense model and its own cells (perplexity "
        "log-linear, accuracy linear); '-' where it saves nowhere so much. Time saved is 1 - 1/speed-up, from the "
        "speed pass.",
    )
    return Table(f"{grid}_trade_off", "Pruning against routing at equal cost", COLUMNS, tuple(blocks), notes)


def read_off(points: Sequence[Point], place: float) -> float | None:
    """The value at `place` on the line through points (place, value); None outside of them."""
    ordered = sorted(points)
    for (left, low), (right, high) in itertools.pairwise(ordered):
        if left <= place <= right:
            return low if right == left else low + (high - low) * (place - left) / (right - left)
    return None


def _row(entry: Entry, curve: Sequence[Entry], saved: Saved) -> Row:
    place = saved(entry)
    assert place is not None
    cells: dict[str, Content] = {
        "saved": Value(100 * place),
        "wikitext": results.perplexity(entry),
        "average": results.average(entry),
    }
    for name, read, there, back in (
        ("wikitext", results.perplexity, math.log, math.exp),
        ("average", results.average, float, float),
    ):
        points = [
            (x, there(value.value))
            for one in curve
            if (x := saved(one)) is not None and (value := read(one)) is not None
        ]
        at = read_off(points, place)
        cells[f"{name}_routed"] = None if at is None else Value(back(at))
    return Row(f"{entry.name}, {100 * entry.sparsity:g} %", cells, recovered=entry.recovered, method=entry.method)


def _macs(entry: Entry) -> float | None:
    found = results.cost(entry, "macs_saved")
    return None if found is None else found.value


def _seconds(phase: str) -> Saved:
    def read(entry: Entry) -> float | None:
        found = results.speedup(entry, phase)
        return 0.0 if entry.kind == "dense" else None if found is None else 1 - 1 / found.value

    return read


_MEASURES: tuple[tuple[str, Saved], ...] = (
    ("MACs", _macs),
    ("prefill time", _seconds("prefill")),
    ("decode time", _seconds("decode")),
)
