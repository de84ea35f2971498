"""`whatif`: one measured workload predicts another, and a check says whether it was right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]

NOMINAL = """
name: nominal
domains:
  story:
    weight: 1.0
    prompt_tokens: {probabilities: {6: 0.5, 12: 0.5}}
    output_tokens: {probabilities: {1: 0.5, 3: 0.5}}
"""
TARGETS = """
- name: long
  domains:
    story:
      weight: 1.0
      prompt_tokens: {probabilities: {6: 0.3, 12: 0.7}}
      output_tokens: {probabilities: {1: 0.5, 3: 0.5}}
- name: elsewhere
  domains:
    story:
      weight: 1.0
      prompt_tokens: {probabilities: {20: 1.0}}
      output_tokens: {probabilities: {1: 1.0}}
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "nominal.yaml").write_text(NOMINAL)
    (tmp_path / "targets.yaml").write_text(TARGETS)
    return tmp_path


def test_measure_predict_and_check(run: Run, routing_folder: Path, text_file: Path, files: Path) -> None:
    table, domain = files / "table.parquet", f"story={text_file}"
    common = ("--domain", domain, "--execution", "sparse")
    done = run(
        "whatif", "measure", routing_folder, "--workload", files / "nominal.yaml", "-n", 60, "-o", table, *common, "-q"
    )
    assert done.code == 0, done.err
    assert "60 prompts" in done.out
    plot = files / "plot.svg"
    found = run("whatif", "predict", table, "--targets", files / "targets.yaml", "--plot", plot, "--json", "-", "-q")
    assert found.code == 0, found.err
    rows = {(row["target"], row["metric"]): row for row in found.json["result"]["rows"]}
    near, far = rows["long", "executed_fraction"], rows["elsewhere", "executed_fraction"]
    assert near["lower"] <= near["estimate"] <= near["upper"]
    assert far["colour"] == "red"
    assert far["estimate"] is None
    assert plot.read_text().startswith("<?xml")
    shown = run("whatif", "predict", table, "--targets", files / "targets.yaml", "-q")
    assert "elsewhere" in shown.out
    assert "red" in shown.out
    arguments = ("--targets", files / "targets.yaml", "--only", "long", "-n", 60, "-o", files / "own")
    checked = run("whatif", "check", routing_folder, table, *arguments, *common, "--json", "-", "-q")
    assert checked.code == 0, checked.err
    own: list[dict[str, Any]] = checked.json["result"]["rows"]
    assert {row["target"] for row in own} == {"long"}
    assert next(row for row in own if row["metric"] == "executed_fraction")["covered"]
    again = run("whatif", "check", routing_folder, table, *arguments, *common, "--json", "-", "-q")
    assert json.dumps(again.json["result"]) == json.dumps(checked.json["result"])  # nothing was measured anew


def test_bad_input_is_one_line(run: Run, routing_folder: Path, files: Path) -> None:
    missing = run("whatif", "predict", files / "no.parquet", "--targets", files / "targets.yaml")
    assert "no.parquet does not exist" in missing.one_line_error()
    arguments = ("--workload", files / "nominal.yaml", "-o", files / "t.parquet", "--execution", "sparse", "-q")
    no_text = run("whatif", "measure", routing_folder, *arguments)
    assert "domain 'story' has no text" in no_text.one_line_error()
    (files / "nominal.yaml").write_text(NOMINAL.replace("weight: 1.0", "weight: 0.9"))
    wrong = run("whatif", "measure", routing_folder, *arguments)
    assert "sum to" in wrong.one_line_error()


ODD = ["[/b]", "[red]x", ":boat:", "$x^$", "a_{", "über"]


def test_names_are_shown_as_they_are(run: Run, routing_folder: Path, text_file: Path, files: Path) -> None:
    """Neither styles, nor pictures, nor formulas, on the terminal and in plots."""
    table = files / "table.parquet"
    common = ("--domain", f"story={text_file}", "--execution", "sparse", "-q")
    nominal = NOMINAL.replace("name: nominal", "name: '[/b]'")
    (files / "nominal.yaml").write_text(nominal)
    measure = ("whatif", "measure", routing_folder, "--workload", files / "nominal.yaml", "-n", 40, "-o", table)
    done = run(*measure, *common)
    assert done.code == 0, done.err
    targets = json.loads(json.dumps([{**_workload(nominal), "name": name} for name in ODD]))
    (files / "targets.yaml").write_text(json.dumps(targets))
    metrics = [{"name": f"m {name}", "column": "macs"} for name in ODD]
    quantile = {"name": "q", "kind": "quantile", "column": "decode_seconds", "level": 0.99}
    (files / "metrics.yaml").write_text(json.dumps([*metrics, quantile]))
    arguments = ("whatif", "predict", table, "--targets", files / "targets.yaml", "--metrics", files / "metrics.yaml")
    shown = run(*arguments, "--plot", files / "plot.svg", "-q", "--json", files / "r.json")
    assert shown.code == 0, shown.err
    for name in ODD:
        assert name in shown.out
    rows = json.loads((files / "r.json").read_text())["result"]["rows"]
    of_quantile = [row for row in rows if row["metric"] == "q"]
    assert all("likelihood_ratio" not in row for row in of_quantile)  # not defined there
    assert not any(value is None for row in rows for key, value in row.items() if key != "estimate")
    (files / "targets.yaml").write_text(json.dumps(targets[1:2]))
    check = ("whatif", "check", routing_folder, table, "--targets", files / "targets.yaml", "-n", 3)
    checked = run(*check, "-o", files / "own", *common, "--json", files / "c.json")
    assert checked.code == 0, checked.err
    assert "[red]x" in checked.out
    assert (files / "own" / "[red]x.parquet").is_file()


def _workload(text: str) -> dict[str, Any]:
    from informed_routing.files.bounded_yaml import parse_yaml

    found: dict[str, Any] = parse_yaml(text, "nominal")
    return found


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".hidden", "x" * 201, "a\tb", "a\x1bb"])
def test_targets_that_would_be_files_elsewhere(run: Run, files: Path, name: str) -> None:
    table = files / "table.parquet"
    _empty_table(table, _workload(NOMINAL))
    (files / "targets.yaml").write_text(json.dumps([{**_workload(NOMINAL), "name": name}]))
    before = sorted(path for path in files.rglob("*"))
    check = ("whatif", "check", "r", table, "--targets", files / "targets.yaml", "-o", files / "own")
    error = run(*check).one_line_error()
    assert "the target" in error or "targets.0" in error
    assert sorted(path for path in files.rglob("*")) == before


def _empty_table(path: Path, workload: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"domain": ["story"], "prompt_tokens": [6], "output_tokens": [1], "macs": [1.0]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"about": json.dumps({"workload": workload})}), path)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("targets: 3", "holds no list"),
        ("{targets: [], metrics: []}", "beside targets"),
        ("- name: x\n  domains: {story: {weight: 1.0, prompt_tokens: true, output_tokens: 1}}", "targets.0"),
        ("- name: x\n  domains: {story: {weight: .nan, prompt_tokens: 6, output_tokens: 1}}", "line 2"),
        ("- &a [*a]", "alias"),
    ],
)
def test_targets_that_cannot_be_read(run: Run, files: Path, targets: str, said: str) -> None:
    table = files / "table.parquet"
    _empty_table(table, _workload(NOMINAL))
    (files / "targets.yaml").write_text(targets)
    assert said in run("whatif", "predict", table, "--targets", files / "targets.yaml").one_line_error()


def test_tables_and_domains_that_are_none(run: Run, routing_folder: Path, text_file: Path, files: Path) -> None:
    (files / "half.parquet").write_bytes(b"PAR1 and then nothing")
    (files / "folder.parquet").mkdir()
    for name, said in {"half.parquet": "no readable Parquet file", "folder.parquet": "is no file"}.items():
        error = run("whatif", "predict", files / name, "--targets", files / "targets.yaml").one_line_error()
        assert said in error
    workload = ("--workload", files / "nominal.yaml", "-o", files / "t.parquet")
    measure = ("whatif", "measure", routing_folder, *workload, "-q")
    twice = run(*measure, "--domain", f"story={text_file}", "--domain", "story=demo:wiki")
    assert "--domain gives story twice" in twice.one_line_error()
    other = run(*measure, "--domain", f"story={text_file}", "--domain", "stroy=demo:wiki")
    assert "--domain stroy: no workload has such a domain" in other.one_line_error()
    assert not (files / "t.parquet").exists()
