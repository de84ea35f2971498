"""`calibrate`: another threshold table, in another folder, and nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
SMALL = ["--tokens", 256, "--sequence-length", 32, "--target", 0.2, "--target", 0.4]


def _table(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "routing_config.json").read_text())["thresholds"]
    return found


def test_a_table_for_ones_own_text(run: Run, routing_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "mine", (routing_folder / "routing.safetensors").read_bytes()
    outcome = run("calibrate", routing_folder, "--data", text_file, *SMALL, "--out", out, "--json", "-")
    assert outcome.code == 0, outcome.err
    assert outcome.json["command"] == "calibrate"
    result = outcome.json["result"]
    assert result.keys() == {"tokens", "thresholds"}
    shares = [row["units"] for row in result["thresholds"]]
    assert any(share == pytest.approx(0.2, abs=0.03) for share in shares)
    assert result["thresholds"][0]["by_context"][0][0] == 1
    assert [row["threshold"] for row in _table(out)] == [row["threshold"] for row in result["thresholds"]]
    assert (out / "routing.safetensors").read_bytes() == before
    assert run("evaluate", out, "--data", text_file, "--split", "all", "--sparsity", 0.3, "--limit", 4).code == 0


def test_the_table_is_printed(run: Run, routing_folder: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = run("calibrate", routing_folder, "--data", text_file, *SMALL, "--out", tmp_path / "mine")
    assert "MACs saved" in outcome.out
    assert "Next: informed-routing evaluate" in outcome.out


def test_it_writes_elsewhere(run: Run, routing_folder: Path, text_file: Path) -> None:
    outcome = run("calibrate", routing_folder, "--data", text_file, *SMALL, "--out", routing_folder)
    assert "is what the fit starts from" in outcome.one_line_error()


@pytest.mark.parametrize(("flag", "value"), [("--target", 1.5), ("--tokens", 0), ("--sequence-length", 1)])
def test_values_out_of_bounds(run: Run, routing_folder: Path, tmp_path: Path, flag: str, value: float) -> None:
    outcome = run("calibrate", routing_folder, flag, value, "--out", tmp_path / "mine")
    assert outcome.code == 2
    assert outcome.one_line_error()


def test_a_dense_model_has_nothing_to_calibrate(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    assert run("calibrate", tiny_folder, "--out", tmp_path / "mine").code == 2
