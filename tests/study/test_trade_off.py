"""Pruning against routing at equal cost: what is read off the routed curve, and where there is nothing to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from informed_routing.study.grid import load_grid
from informed_routing.study.plan import expand
from informed_routing.study.report import write_report
from informed_routing.study.results import Value, entries, speedup
from informed_routing.study.store import Store
from informed_routing.study.trade_off import read_off, trade_off

from .test_tables import record


def test_values_are_read_off_lines_between_points_and_nowhere_else() -> None:
    points = [(0.4, 10.0), (0.0, 2.0), (0.2, 4.0)]
    assert read_off(points, 0.1) == pytest.approx(3.0)
    assert read_off(points, 0.2) == 4.0
    assert read_off(points, 0.3) == pytest.approx(7.0)
    assert read_off(points, -0.01) is None
    assert read_off(points, 0.41) is None
    assert read_off([(0.1, 5.0), (0.1, 5.0)], 0.1) == 5.0


def _timed(speedup: float, engine: str = "native") -> dict[str, Any]:
    dense = {"native": {"median": speedup}, "transformers": {"median": 3 * speedup}}
    return {"engine": engine, "seconds": 1.0, "dense_engines": dense}


def test_speed_ups_are_within_one_engine(tmp_path: Path) -> None:
    _, cells, store = filled(tmp_path, None)
    cell = next(cell for cell in cells if cell.method == "shortgpt")
    for engine, expected in (("native", 1.5), ("torch", 4.5), ("transformers", 4.5)):
        store.keep_speed(cell, {"prefill": _timed(1.5, engine)})
        found = next(entry for entry in entries([cell], store))
        assert speedup(found, "prefill") == Value(expected)


def filled(root: Path, routed_speed: float | None) -> Any:
    """Dense 10; informed 20 and 40 at 20 and 30 % of the MACs; one pruned model each at 25 and at 40 %."""
    grid, store = load_grid("equal-cost", models=("m/m",)), Store(root)
    cells = expand(grid)
    for cell in cells:
        known = {
            ("dense", 0.0): (10.0, 0.6, 0.0),
            ("informed", 0.25): (20.0, 0.5, 0.2),
            ("informed", 0.40): (40.0, 0.4, 0.3),
            ("shortgpt", 0.25): (30.0, 0.45, 0.25),
            ("shortgpt", 0.40): (90.0, 0.4, 0.4),
        }.get((cell.method, cell.sparsity))
        if known is None or (cell.method == "informed" and not cell.recovered):
            continue
        costs = {"macs_saved": known[2], "parameters_saved": 0.0, "kv_bytes_per_token": 1024}
        store.keep(cell, record(cell, *known[:2], accounting=costs))
        speed = routed_speed if cell.method == "informed" else 1.25
        if speed is not None and cell.kind != "dense":
            store.keep_speed(cell, {"prefill": _timed(speed)})
    return grid, cells, store


def test_a_pruned_model_stands_beside_the_routed_one_at_its_macs(tmp_path: Path) -> None:
    grid, cells, store = filled(tmp_path, None)
    table = trade_off(grid, entries(cells, store))
    assert [block.title for block in table.blocks] == [
        "m/m, Informed routing, recovered, at equal MACs",
        "m/m, Informed routing, recovered, at equal prefill time",  # of the pruned ones
    ]
    first, second, *own = table.blocks[0].rows
    assert (first.label, second.label) == ("ShortGPT, recovered, 25 %", "ShortGPT, recovered, 40 %")
    routed = first.cells["wikitext_routed"]
    assert isinstance(routed, Value)
    assert routed.value == pytest.approx((20 * 40) ** 0.5)  # half way, on a log scale
    assert first.cells["average_routed"] == Value(pytest.approx(45.0))  # type: ignore[arg-type]
    assert second.cells["wikitext_routed"] is None  # routing never saves 40 % here
    assert [row.label for row in own] == ["Informed routing, recovered, 25 %", "Informed routing, recovered, 40 %"]
    assert (own[1].cells["saved"], own[1].cells["wikitext"]) == (Value(pytest.approx(30.0)), Value(40.0))  # type: ignore[arg-type]
    assert table.blocks[1].rows[0].cells["wikitext_routed"] is None


def test_time_is_what_the_speed_pass_measured(tmp_path: Path) -> None:
    grid, cells, store = filled(tmp_path, 1.25)
    table = trade_off(grid, entries(cells, store))
    row = table.blocks[1].rows[0]
    assert row.cells["saved"] == Value(pytest.approx(20.0))  # type: ignore[arg-type]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    grid, cells, store = filled(tmp_path, None)
    store.keep_failure(next(cell for cell in cells if cell.method == "slicegpt"), {"error": "too thin"})
    report = write_report([grid], {grid.name: cells}, store)
    text = (tmp_path / "equal-cost.md").read_text()
    assert "routed there" in text
    assert "- SliceGPT, recovered, 25 %: too thin\n- SliceGPT, recovered, 40 %: not run" in text
    assert report.tables["equal-cost"]
