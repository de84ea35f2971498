"""Whole studies on a tiny model: every method, resume, failures, Ray."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.study.conftest import ALL_METHODS, FEW_METHODS

from informed_routing.study.estimate import listing
from informed_routing.study.grid import Grid, Speed
from informed_routing.study.plan import expand
from informed_routing.study.report import write_report
from informed_routing.study.runner import run
from informed_routing.study.speed import run_speed
from informed_routing.study.store import Store

pytest.importorskip("lm_eval")

ROOT = Path(__file__).resolve().parents[2]


def without_times(record: Any) -> Any:
    """A record without what a clock, or the machine, put into it."""
    if isinstance(record, dict):
        return {
            key: without_times(value)
            for key, value in record.items()
            if key not in ("seconds", "wall_seconds", "environment", "threads")
        }
    return [without_times(one) for one in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def all_methods(
    make_grid: Callable[..., Grid], data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Grid, Store]:
    """A finished study of every method."""
    import torch

    torch.set_num_threads(1)
    grid, store = make_grid(ALL_METHODS), Store(tmp_path_factory.mktemp("study"))
    outcome = run(expand(grid, data_dir), store)
    assert outcome.failed == {}
    return grid, store


def test_every_method_gives_a_whole_record(all_methods: tuple[Grid, Store], data_dir: Path) -> None:
    grid, store = all_methods
    for cell in expand(grid, data_dir):
        record = store.record(cell)
        assert record is not None
        assert set(record["tasks"]) == {"boolq", "arc_easy", "wikitext"}
        assert record["tasks"]["boolq"]["documents"] == 3
        assert record["tasks"]["wikitext"]["word_perplexity"] > 1
        assert 0 <= record["average"]["accuracy"] <= 1
        assert math.isfinite(record["validation"]["loss"])
        assert record["training"]["tokens"] == cell.tokens
        taken = [sum(stage["seconds"].values()) for stage in record["training"]["stages"]]
        assert record["training"]["seconds"] == pytest.approx(sum(taken), abs=0.01)  # both stages calibrate
        costs = record["accounting"]
        assert costs["kv_bytes_per_token"] <= 2 * 3 * 2 * 16 * 4
        if cell.method == "dense":
            assert costs["parameters_saved"] == costs["macs_saved"] == costs["kv_saved"] == 0


def test_dynamic_methods_are_judged_at_equal_shares(all_methods: tuple[Grid, Store], data_dir: Path) -> None:
    """On calibration text; the shares of each task are reported as they came out."""
    grid, store = all_methods
    for cell in expand(grid, data_dir):
        record = store.record(cell)
        assert record is not None
        if cell.kind != "dynamic":
            assert "threshold" not in record
            continue
        if cell.method == "mod":
            assert record["threshold"] == {"decision": "top-k"}
            assert record["validation"]["sparsity"]["units"] == pytest.approx(0.25, abs=0.02)
        else:
            assert record["threshold"]["units"] == pytest.approx(0.25, abs=0.03)
        for task in record["tasks"].values():
            assert 0 < task["sparsity"]["units"] < 1
        assert record["features"]["similar"] <= 1
        assert len(record["features"]["layers"]) == 3
        assert len(record["allocation"]) == 6


def test_accounts_say_what_is_really_saved(all_methods: tuple[Grid, Store], data_dir: Path) -> None:
    grid, store = all_methods
    costs = {
        (cell.method, cell.recovered): record["accounting"]
        for cell in expand(grid, data_dir)
        if (record := store.record(cell)) is not None
    }
    assert costs["shortgpt", True]["macs_saved"] == pytest.approx(1 / 3)
    assert costs["shortgpt", True]["kv_saved"] == pytest.approx(1 / 3)
    assert costs["slicegpt", False]["kv_saved"] == 0
    assert costs["informed", False]["parameters_saved"] < 0
    assert costs["d-llm", True]["kv_saved"] > 0
    assert costs["informed", True]["kv_saved"] == 0


def test_a_second_run_repeats_nothing(all_methods: tuple[Grid, Store], data_dir: Path) -> None:
    grid, store = all_methods
    begun = time.perf_counter()
    outcome = run(expand(grid, data_dir), store)
    assert outcome.made == ()
    assert len(outcome.found) == 11
    assert time.perf_counter() - begun < 2


def test_tables_plots_and_page(all_methods: tuple[Grid, Store], data_dir: Path) -> None:
    grid, store = all_methods
    report = write_report([grid], {grid.name: expand(grid, data_dir)}, store)
    assert {path.name for path in report.files} == {"short.md", "short.csv", "short.svg"}
    assert all(path.stat().st_size > 200 for path in report.files)
    assert len(report.tables["short"]) == 11
    header = (store.root / "short.md").read_text().split("\n")[4]
    assert header.startswith("|  | BoolQ | ARC-E | AVG |")  # the tasks of the grid alone
    again = write_report([grid], {grid.name: expand(grid, data_dir)}, store)
    assert [path.read_bytes() for path in report.files] == [path.read_bytes() for path in again.files]


def test_the_speed_pass_times_finished_cells_once(all_methods: tuple[Grid, Store], data_dir: Path) -> None:
    grid, store = all_methods
    cells = [c for c in expand(grid, data_dir) if c.method in ("dense", "shortgpt", "mod", "informed") and c.recovered]
    settings = Speed(prompt_tokens=8, new_tokens=2, repeats=1, at_once=2)
    assert run_speed(cells, store, settings, device="cpu") == 3
    for cell in cells:
        found = store.speed(cell)
        assert found is not None
        for phase in ("prefill", "decode"):
            one = found[phase]
            assert one["speedup_vs_dense"] == pytest.approx(one["dense_seconds"] / one["seconds"])
            assert one["seconds"] == min(timing["median"] for timing in one["engines"].values())
            assert {"transformers"} <= set(one["dense_engines"])
    assert run_speed(cells, store, settings, device="cpu") == 0


def test_estimates_come_from_what_was_measured(
    all_methods: tuple[Grid, Store], data_dir: Path, make_grid: Callable[..., Grid], tmp_path: Path
) -> None:
    grid, store = all_methods
    cells = expand(grid, data_dir)
    assert {row["state"] for row in listing(cells, store)} == {"done"}
    assert all(row["seconds"] == 0 for row in listing(cells, store))
    fresh = listing(cells, Store(tmp_path))
    assert {row["state"] for row in fresh} == {"waiting"}
    assert {row["seconds"] for row in fresh if row["kind"] != "dense"} == {None}
    other = expand(make_grid(ALL_METHODS, seeds=[17, 18]), data_dir)
    seconds = [row["seconds"] for row in listing(other, store) if row["seed"] == 18]
    assert all(value is not None and value > 0 for value in seconds)


def test_a_failing_cell_is_reported_and_stops_nobody(
    make_grid: Callable[..., Grid], data_dir: Path, tmp_path: Path
) -> None:
    methods = {
        "dense": FEW_METHODS["dense"],
        "wide": {**ALL_METHODS["informed"], "label": "Too wide", "overrides": {"forecaster.rank": 65}},
        "shortgpt": {**ALL_METHODS["shortgpt"], "recovered": [False]},
    }
    grid, store = make_grid(methods), Store(tmp_path)
    cells = expand(grid, data_dir)
    outcome = run(cells, store)
    assert {name.split("_")[1] for name in outcome.failed} == {"wide"}
    assert all("rank 65 is above the model's hidden size 64" in error for error in outcome.failed.values())
    assert len(outcome.made) == 2
    broken = store.failure(cells[1])
    assert broken is not None
    assert "Traceback" in broken["traceback"]
    text = write_report([grid], {grid.name: cells}, store).texts[0]
    assert "failed" in text
    assert "- Too wide at 25 %: rank 65 is above" in text
    assert len(run(cells, store).failed) == 2  # tried again, and only these


KILLED = """
import sys
import torch
from informed_routing.study.grid import load_grid
from informed_routing.study.plan import expand
from informed_routing.study.runner import run
from informed_routing.study.store import Store
torch.set_num_threads(1)
run(expand(load_grid(sys.argv[1]), sys.argv[2]), Store(__import__("pathlib").Path(sys.argv[3])))
"""


def test_a_killed_study_continues_without_repeating_cells(
    write_grid: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    """Killed in the middle; what it had finished stays as it was, and the end is that of an uninterrupted run."""
    from informed_routing.study.grid import load_grid

    methods = {**FEW_METHODS, "informed": {**FEW_METHODS["informed"], "recovered": [False]}}
    path = write_grid(methods, evaluation={"limit": 2, "validation_tokens": 64, "tasks": ["boolq@0"]})
    command = [sys.executable, "-c", KILLED, str(path), str(data_dir), str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    finished = tmp_path / "killed" / "cells"
    deadline = time.monotonic() + 120
    while len(list(finished.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in finished.glob("*.json")}
    cells, store = expand(load_grid(str(path)), data_dir), Store(tmp_path / "killed")
    assert 2 <= len(before) < len(cells)
    outcome = run(cells, store)
    assert outcome.failed == {}
    assert set(outcome.found) == {file.name.rsplit("_", 1)[0] for file in before}
    assert {file: file.stat().st_mtime_ns for file in before} == before
    whole = Store(tmp_path / "whole")
    run(cells, whole)
    for cell in cells:
        assert without_times(store.record(cell)) == without_times(whole.record(cell)), cell.name


def test_two_studies_in_one_folder_are_refused(make_grid: Callable[..., Grid], data_dir: Path, tmp_path: Path) -> None:
    from informed_routing.errors import InputError

    store = Store(tmp_path)
    with store.locked(), pytest.raises(InputError, match="another study is running"):
        run(expand(make_grid(FEW_METHODS), data_dir), store)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_records(
    all_methods: tuple[Grid, Store], make_grid: Callable[..., Grid], data_dir: Path, tmp_path: Path
) -> None:
    """Two local workers; a stage that fails is the failure of its cells alone."""
    methods = {
        **FEW_METHODS,
        "wide": {**ALL_METHODS["informed"], "label": "Too wide", "overrides": {"forecaster.rank": 65}},
    }
    grid, store = make_grid(methods), Store(tmp_path)
    cells = expand(grid, data_dir)
    outcome = run(cells, store, ray="local")
    assert {name.split("_")[1] for name in outcome.failed} == {"wide"}
    assert all("rank 65" in error for error in outcome.failed.values())
    _, sequential = all_methods
    for cell in cells:
        if cell.method != "wide":
            found, wanted = store.record(cell), sequential.record(cell)
            assert found is not None
            assert json.dumps(without_times(found), sort_keys=True) == json.dumps(without_times(wanted), sort_keys=True)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_missing_ray_is_named(make_grid: Callable[..., Grid], data_dir: Path, tmp_path: Path) -> None:
    from informed_routing.errors import InputError

    with pytest.raises(InputError, match=r"need ray, not installed here.*informed-routing\[ray\]"):
        run(expand(make_grid(FEW_METHODS), data_dir), Store(tmp_path), ray="local")
