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
