"""Tables and claims from records: marks, missing and failed rows, the paper's numbers beside ours."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from informed_routing.study.agreement import agreement
from informed_routing.study.claims import claims
from informed_routing.study.effort import effort
from informed_routing.study.grid import load_grid
from informed_routing.study.layouts import build_table
from informed_routing.study.paper import printed, value
from informed_routing.study.plan import Cell, expand
from informed_routing.study.report import write_report
from informed_routing.study.results import Value, entries
from informed_routing.study.store import Store
from informed_routing.study.tables import Block, Column, Row, Table, comma_separated, markdown
from informed_routing.study.verdicts import ahead, less

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


def test_paper_rows_stand_beside_ours_only_for_its_model(tmp_path: Path) -> None:
    numbers = {("informed", 0.25, False): (12.0, 0.6)}
    for model, wanted in ((LLAMA, True), ("elsewhere/llama-3.1-8b", True), ("demo:smollm2-135m", False)):
        grid, cells, store = filled("table1", tmp_path / model, numbers, model)
        text = markdown(build_table(grid, entries(cells, store)))
        assert ("(paper)" in text) == wanted
        assert "60.00 ± 1.00" in text  # ours
        assert ("| 64.62 | 9.43 |" in text) == wanted
        assert "not run" in text


def test_every_row_of_the_paper_has_its_row_here() -> None:
    """But rank 1,000, which the embedded model has no room for."""
    for name in ("table1", "table2", "table3", "table4", "table5", "table8", "table9", "figure1"):
        ours = {(cell.method, cell.sparsity, cell.recovered) for cell in expand(load_grid(name))}
        theirs = {(row.method, row.sparsity, row.recovered) for row in printed(name)}
        assert theirs - ours <= {("rank-1000", 0.25, True)}, name


def test_printed_averages_are_the_means_of_printed_accuracies() -> None:
    """A slip in copying would show; the paper itself rounds, and one of its means is off by 0.5."""
    for table in ("table1", "table3", "table5"):
        for row in printed(table):
            mean = sum(row.values[task] for task in TASKS) / 7
            assert abs(mean - row.values["average"]) < 0.06, row


def test_printed_numbers_agree_with_the_text_of_the_paper() -> None:
    assert value("table1", "skipgpt", 0.25, False, "wikitext") == 20.76
    assert value("table1", "skipgpt", 0.40, False, "wikitext") == 53.94
    assert value("table4", "informed", 0.70, False, "wikitext") == 88.17
    # Table 5: "improving the average accuracy by 11 % and reducing perplexity by 24"
    accuracy = [value("table5", method, 0.25, False, "average") for method in ("informed", "skipgpt")]
    perplexity = [value("table5", method, 0.25, False, "wikitext") for method in ("informed", "skipgpt")]
    assert 11 < accuracy[0] - accuracy[1] < 12
    assert 24 < perplexity[1] - perplexity[0] < 25


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


def test_all_claims_hold_for_the_paper_itself(tmp_path: Path) -> None:
    """Judged on the printed numbers, each claim of the paper is true: else the claim was misread here."""
    grids = {}
    for name in ("table1", "table2", "table3", "table4", "table8", "table9", "figure1"):
        grid, store = load_grid(name, models=(LLAMA,)), Store(tmp_path / name)
        cells = expand(grid)
        rows = {(row.method, row.sparsity, row.recovered): row.values for row in printed(name)}
        for cell in cells:
            numbers = rows.get((cell.method, cell.sparsity, cell.recovered))
            if numbers is None:
                continue
            made = record(cell, numbers.get("wikitext", 1.0), numbers.get("average", 0.0) / 100, stderr=0.0)
            made["validation"]["loss"] = numbers.get("loss", 1.0)
            made["training"]["seconds"] = 3.083 * 3600 + 4 * 3600 * cell.recovered
            if "similar" in numbers:
                made["features"] = {"similar": numbers["similar"] / 100}
            if "attention_part" in numbers:
                made["sparsity"] |= {
                    "attention": 2 * cell.sparsity * numbers["attention_part"] / 100,
                    "ffn": 2 * cell.sparsity * numbers["ffn_part"] / 100,
                }
            store.keep(cell, made)
        grids[name] = entries(cells, store)
    for claim in claims():
        verdict = claim.judge(grids)
        assert verdict.word == "holds", (claim.where, claim.statement, verdict)


def test_a_difference_within_the_error_decides_nothing(tmp_path: Path) -> None:
    sides = (("informed", 0.25, True), ("skipgpt", 0.25, True))
    _, cells, store = filled("table1", tmp_path, {sides[0]: (9.0, 0.50), sides[1]: (9.5, 0.502)})
    found = entries(cells, store)
    from informed_routing.study.results import average, perplexity

    assert less(found, sides[1], sides[0], average).word == "within the error"
    assert less(found, sides[0], sides[1], perplexity).word == "holds"
    assert less(found, sides[1], sides[0], perplexity).word == "does not hold"
    assert less(found, ("mod", 0.25, True), sides[0], perplexity).word == "not measured"
    assert ahead(found, sides[0], sides[1:]).word == "within the error"
    assert ahead(found, sides[1], sides[:1]).word == "does not hold"
    _, cells, store = filled("table1", tmp_path / "clear", {sides[0]: (9.0, 0.60), sides[1]: (9.5, 0.50)})
    assert ahead(entries(cells, store), sides[0], sides[1:]).word == "holds"


def test_the_page_counts_and_names_every_claim(tmp_path: Path) -> None:
    _, cells, store = filled(
        "table1", tmp_path, {("informed", 0.25, False): (9.0, 0.6), ("skipgpt", 0.25, False): (20.0, 0.5)}
    )
    page = agreement({"table1": entries(cells, store)}, LLAMA)
    assert page is not None
    assert page.count("\n| Table 1 |") == sum(claim.where == "Table 1" for claim in claims())
    counts = [
        int(number) for number in re.findall(r"(\d+) (?:holds|does not hold|within the error|not measured)", page)
    ]
    assert counts == [2, 0, 0, len(claims()) - 2]


def test_a_grid_without_claims_leaves_the_page_of_others_alone(tmp_path: Path) -> None:
    for name, there in (("figure3", False), ("table1", True), ("equal-cost", True)):
        numbers = {("informed", 0.25, False): (9.0, 0.6), ("skipgpt", 0.25, False): (20.0, 0.5)}
        grid, cells, store = filled(name, tmp_path, numbers)
        report = write_report([grid], {name: cells}, store)
        page = tmp_path / "agreement.md"
        assert page.exists() == there
        assert (page in report.files) == (name == "table1")
    assert "2 holds" in page.read_text()


def test_shared_stages_count_once_in_what_a_study_took(tmp_path: Path) -> None:
    grid, cells, store = filled(
        "table1", tmp_path, {("informed", 0.25, False): (9.0, 0.6), ("skipgpt", 0.25, False): (20.0, 0.5)}
    )
    found = entries(cells, store)
    said = "2 cells: 1,000 tokens of training in 10 s, shared stages counted once; evaluation 40 s; 0.0 h"
    assert effort(found).startswith(said)
    assert effort([*found, *found]) == effort(found)  # tables that share cells
    assert said in markdown(build_table(grid, found))
    assert said in (agreement({"table1": found}, LLAMA) or "")
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
