"""Tables from records: marks, seeds, missing and failed rows, plots."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from informed_routing.study.effort import effort
from informed_routing.study.grid import load_grid
from informed_routing.study.layouts import build_table
from informed_routing.study.plan import Cell, expand
from informed_routing.study.report import write_report
from informed_routing.study.results import Value, entries
from informed_routing.study.store import Store
from informed_routing.study.tables import Block, Column, Row, Table, comma_separated, markdown

LLAMA = "meta-llama/Llama-3.1-8B"
TASKS = {
    "boolq": "acc",
    "openbookqa": "acc_norm",
    "piqa": "acc",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
}


def record(cell: Cell, perplexity: float, accuracy: float, *, stderr: float = 0.01, **more: Any) -> dict[str, Any]:
    """A record such as a cell leaves."""
    tasks: dict[str, Any] = {task: {metric: accuracy, f"{metric}_stderr": stderr} for task, metric in TASKS.items()}
    sparsity: dict[str, float] = {"target": cell.sparsity, "macs": 0.2}
    if cell.kind == "dynamic":
        sparsity |= {"units": cell.sparsity, "attention": 1.2 * cell.sparsity, "ffn": 0.8 * cell.sparsity}
    return {
        "key": cell.key,
        "cell": cell.labels(),
        "tasks": {**tasks, "wikitext": {"word_perplexity": perplexity}},
        "average": {"accuracy": accuracy, "stderr": stderr / 7**0.5},
        "validation": {"loss": perplexity / 4},
        "sparsity": sparsity,
        "accounting": {"macs_saved": 0.2, "parameters_saved": 0.0, "kv_bytes_per_token": 1024},
        "training": {
            "tokens": 1000,
            "seconds": 10.0,
            "stages": [{"key": "the same for all", "tokens": 1000, "seconds": {"route": 7.0, "calibrate": 3.0}}],
        },
        "wall_seconds": {"training": 10.0, "evaluation": 20.0},
        "threads": 1,
        **more,
    }


def filled(
    name: str, root: Path, numbers: dict[tuple[str, float, bool], tuple[float, float]], model: str = LLAMA
) -> Any:
    """A grid with records of some cells: (perplexity, accuracy) by method, sparsity and recovery."""
    grid, store = load_grid(name, models=(model,)), Store(root)
    cells = expand(grid)
    for cell in cells:
        found = numbers.get((cell.method, cell.sparsity, cell.recovered))
        if found is not None:
            store.keep(cell, record(cell, *found))
    return grid, cells, store


def test_marks_are_given_within_a_block_and_not_to_references() -> None:
    columns = (Column("acc", "acc", "high"), Column("ppl", "ppl", "low"), Column("n", "n", None))
    rows = (
        Row("dense", {"acc": Value(99), "ppl": Value(1), "n": Value(5)}, reference=True),
        Row("a", {"acc": Value(50, 2), "ppl": Value(9), "n": Value(5)}),
        Row("b", {"acc": Value(60), "ppl": Value(8), "n": Value(6)}),
        Row("c", {"acc": Value(40), "ppl": Value(20), "n": Value(7)}),
        Row("d", {"acc": "failed"}),
        Row("b", {"acc": Value(98)}, source="paper"),
    )
    text = markdown(Table("t", "T", columns, (Block("25 %", rows), Block("40 %", rows[2:4]))))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[2] == "| dense | 99.00 | 1.00 | 5.00 |"
    assert lines[3] == "| a | <u>50.00 ± 2.00</u> | <u>9.00</u> | 5.00 |"
    assert lines[4] == "| b | **60.00** | **8.00** | 6.00 |"
    assert lines[5] == "| c | 40.00 | 20.00 | 7.00 |"
    assert lines[6] == "| d | failed | - | - |"
    assert lines[7] == "| *b (paper)* | 98.00 | - | - |"
    assert lines[-1] == "| c | <u>40.00</u> | <u>20.00</u> | 7.00 |"  # second of two, in its own block


def test_csv_holds_exact_numbers() -> None:
    table = Table("t", "T", (Column("acc", "acc"),), (Block("b", (Row("a", {"acc": Value(1 / 3, 0.1)}),), "m", 0.25),))
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert rows[0]["value"] == str(1 / 3)
    assert rows[0]["stderr"] == "0.1"
    assert (rows[0]["model"], rows[0]["sparsity"]) == ("m", "0.25")


def test_seeds_are_taken_together(tmp_path: Path) -> None:
    grid, store = load_grid("table3", models=("m/m",), seeds=(1, 2, 3)), Store(tmp_path)
    cells = expand(grid)
    chosen = [cell for cell in cells if cell.method == "informed-balanced"]
    for cell, perplexity in zip(chosen, (10.0, 12.0, 14.0), strict=True):
        store.keep(cell, record(cell, perplexity, 0.5, stderr=0.03))
    entry = next(entry for entry in entries(cells, store) if entry.method == "informed-balanced")
    found = entry.value(lambda r: r["tasks"]["wikitext"]["word_perplexity"])
    assert found is not None
    assert found.value == 12.0
    assert found.stderr == pytest.approx(2 / 3**0.5)
    assert entry.missing == 0


def test_shared_stages_count_once_in_what_a_study_took(tmp_path: Path) -> None:
    grid, cells, store = filled(
        "table1", tmp_path, {("informed", 0.25, False): (9.0, 0.6), ("skipgpt", 0.25, False): (20.0, 0.5)}
    )
    found = entries(cells, store)
    said = "2 cells: 1,000 tokens of training in 10 s, shared stages counted once; evaluation 40 s; 0.0 h"
    assert effort(found).startswith(said)
    assert effort([*found, *found]) == effort(found)  # tables that share cells
    assert said in markdown(build_table(grid, found))
    assert effort([]) == ""


@pytest.mark.parametrize("name", ["table1", "table2", "table4", "table9", "figure1", "figure3", "equal-cost"])
def test_every_layout_is_written_with_its_plot(name: str, tmp_path: Path) -> None:
    grid, store = load_grid(name, models=("m/m",)), Store(tmp_path)
    cells = expand(grid)
    features = {"similar": 0.2, "layers": [0.9, 0.8]}
    units = [{"layer": n // 2, "kind": ("attention", "ffn")[n % 2], "executed": 0.5} for n in range(4)]
    for number, cell in enumerate(cells[:-1]):
        store.keep(cell, record(cell, 10.0 + number, 0.4, features=features, allocation=units))
    store.keep_failure(cells[-1], {"error": "the last one broke"})
    report = write_report([grid], {name: cells}, store)
    assert {path.name for path in report.files} >= {f"{name}.md", f"{name}.csv"}
    if len(cells) > 1:
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
        assert f"![{grid.title}]({name}.svg)" in (tmp_path / f"{name}.md").read_text()
    assert "the last one broke" in (tmp_path / f"{name}.md").read_text()


def test_labels_are_shown_as_they_are() -> None:
    """A bar begins no cell, dollar signs no formula."""
    from informed_routing.study.figures import plain
    from informed_routing.study.tables import Block, Column, Row, Table, markdown

    table = Table("t", "T", (Column("x", "X"),), (Block("b", (Row("a|b [/c] $x^$", {"x": "d|e"}),)),))
    line = markdown(table).splitlines()[-1]
    assert line == r"| a\|b [/c] $x^$ | d\|e |"
    assert plain("$x^$") == r"\$x^\$"
