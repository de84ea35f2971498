"""What a study will take, from what its cells took so far; shown before anything is run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .plan import Cell
from .stages import Stage
from .store import Store, stage_seconds


def listing(cells: Sequence[Cell], store: Store) -> list[dict[str, Any]]:
    """Every cell with its state, and the seconds that it still needs (None while nothing like it has been measured).

    A stage's seconds are those of finished stages of the same kind, in proportion to their text; an evaluation's are
    the median of finished cells of the same kind. Stages shared with an earlier cell cost nothing again.
    """
    rates, evaluations = _measured(cells, store)
    counted: set[str] = set()
    rows = []
    for cell in cells:
        state = store.state(cell)
        seconds: float | None = 0.0
        if state != "done":
            seconds = evaluations.get(cell.kind, evaluations.get("any"))
            for stage in cell.stages:
                if stage.key in counted or store.stage_report(stage) is not None:
                    continue
                counted.add(stage.key)
                rate = rates.get(_kind(stage), rates.get("any"))
                seconds = None if seconds is None or rate is None else seconds + rate * stage.tokens
        fault = store.failure(cell) if state == "failed" else None
        rows.append(
            {
                **cell.labels(),
                "key": cell.key,
                "state": state,
                "tokens": cell.tokens,
                "stages": [stage.name for stage in cell.stages],
                "seconds": seconds,
                "error": None if fault is None else fault["error"],
            }
        )
    return rows


def _measured(cells: Sequence[Cell], store: Store) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds for each token of the kinds of stage, and for the evaluation of the kinds of cell."""
    rates: dict[str, list[float]] = {}
    for stage in {stage.key: stage for cell in cells for stage in cell.stages}.values():
        report = store.stage_report(stage)
        if report is not None and stage.tokens:
            for kind in (_kind(stage), "any"):
                rates.setdefault(kind, []).append(stage_seconds(report) / stage.tokens)
    evaluations: dict[str, list[float]] = {}
    for cell in cells:
        record = store.record(cell)
        if record is not None:
            for kind in (cell.kind, "any"):
                evaluations.setdefault(kind, []).append(record["wall_seconds"]["evaluation"])
    return _medians(rates), _medians(evaluations)


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in values.items()}


def _kind(stage: Stage) -> str:
    return stage.kind if stage.kind != "fit" else "-".join(stage.settings["stages"])
