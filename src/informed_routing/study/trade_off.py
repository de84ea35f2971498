"""Pruned models against routing at equal MACs and at equal latency, since equal nominal sparsity saves unequal amounts.

A pruned model stands at what it saves; the routed method's numbers there are read off the curve through its own cells,
which begins at the dense model: perplexity log-linear, accuracy linear. Nothing is read beyond its last cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from . import results
from .effort import effort
from .grid import Grid
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

_NOTE = (
    "'Routed there' is read off the curve through the dense model and the routed method's own cells, which are the "
    "last rows (perplexity log-linear, accuracy linear); '-' where it saves nowhere so much. Time saved is "
    "1 - 1/speed-up, from the speed pass, over the dense model in the same engine."
)


def trade_off(grid: Grid, found: Sequence[Entry]) -> Table:
    """Each pruned model of a grid beside each method that routes, at the same saving; then that method's own cells."""
    blocks = []
    for model in dict.fromkeys(entry.model for entry in found):
        own = [entry for entry in found if entry.model == model and entry.records]
        sides = dict.fromkeys((entry.method, entry.recovered) for entry in own if entry.kind == "dynamic")
        for method, recovered in sides:
            routed = [entry for entry in own if (entry.method, entry.recovered) == (method, recovered)]
            pruned = [entry for entry in own if entry.kind == "static" and entry.recovered == recovered]
            curve = [entry for entry in own if entry.kind == "dense"] + routed
            for title, saved in _MEASURES:
                rows = [_row(entry, place, curve, saved) for entry in pruned if (place := saved(entry)) is not None]
                rows += [_own_row(entry, place) for entry in routed if (place := saved(entry)) is not None]
                if rows:
                    blocks.append(Block(f"{model}, {routed[0].name}, at equal {title}", tuple(rows), model))
    missing = [
        f"- {_name(entry)}: {entry.errors[0] if entry.errors else 'not run'}" for entry in found if not entry.records
    ]
    absent = "Missing:\n\n" + "\n".join(missing) if missing else ""
    return Table(grid.name, grid.title or grid.name, COLUMNS, tuple(blocks), (effort(found), _NOTE, absent))


def read_off(points: Sequence[Point], place: float) -> float | None:
    """The value at `place` on the line through points (place, value); None outside of them."""
    ordered = sorted(points)
    for (left, low), (right, high) in itertools.pairwise(ordered):
        if left <= place <= right:
            return low if right == left else low + (high - low) * (place - left) / (right - left)
    return None


def _row(entry: Entry, place: float, curve: Sequence[Entry], saved: Saved) -> Row:
    """A pruned model, and what is read off the curve where it stands."""
    row = _own_row(entry, place)
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
        row.cells[f"{name}_routed"] = None if at is None else Value(back(at))
    return row


def _own_row(entry: Entry, place: float) -> Row:
    """What an entry saves, and its own numbers."""
    cells: dict[str, Content] = {
        "saved": Value(100 * place),
        "wikitext": results.perplexity(entry),
        "average": results.average(entry),
    }
    return Row(_name(entry), cells, recovered=entry.recovered, method=entry.method)


def _name(entry: Entry) -> str:
    return entry.name if entry.kind == "dense" else f"{entry.name}, {100 * entry.sparsity:g} %"


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
