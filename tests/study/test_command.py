"""The command: dry run, tables, errors that name the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.study.conftest import FEW_METHODS

from informed_routing.cli import main

pytest.importorskip("lm_eval")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("table1", ...)`: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["study", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_has_examples(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "informed-routing study table1" in out


def test_a_study_from_dry_run_to_tables(
    run: Callable[..., tuple[int, str, str]], write_grid: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    methods = {"dense": FEW_METHODS["dense"], "shortgpt": {**FEW_METHODS["shortgpt"], "recovered": [False]}}
    grid, out = write_grid(methods), tmp_path / "out"
    common = (grid, "--out", out, "--data-dir", data_dir, "--threads", 1, "-q", "--limit", 2)
    code, listing, _ = run(*common, "--dry-run")
    assert code == 0
    assert listing.count("waiting") == 2
    assert not out.exists()
    code, shown, _ = run(*common, "--cells", "*dense*")
    assert code == 0
    assert "| ShortGPT | not run |" in shown
    code, listing, _ = run(*common, "--dry-run", "--json", "-")
    assert [row["state"] for row in json.loads(listing)["result"]["cells"]] == ["done", "waiting"]
    code, shown, _ = run(*common, "--json", tmp_path / "result.json")
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "study"
    assert {row["method"] for row in result["result"]["tables"]["short"]} == {"dense", "shortgpt"}
    assert all(row["cells"]["wikitext"]["value"] > 1 for row in result["result"]["tables"]["short"])
    assert (out / "short.md").is_file()
    before = (out / "short.md").read_bytes()
    code, _, _ = run(*common, "--tables-only")
    assert code == 0
    assert (out / "short.md").read_bytes() == before


def test_a_failed_cell_is_the_exit_code(
    run: Callable[..., tuple[int, str, str]], write_grid: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    wide = {"label": "Too wide", "recipe": "small", "recovered": [False], "overrides": {"forecaster.rank": 65}}
    arguments = (write_grid({"wide": wide}), "--out", tmp_path, "--data-dir", data_dir, "--threads", 1, "-q")
    code, shown, error = run(*arguments)
    assert code == 1
    assert "failed" in shown
    assert "1 of 1 cells failed" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tabel1",), "study 'tabel1' does not exist"),
        (("table1", "--limit", "0"), "--limit 0 is below 1"),
        (("table1", "--data-dir", "nowhere"), "--data-dir nowhere does not exist"),
        (("table1", "--cells", "zebra"), "no cell matches 'zebra'"),
        (("table1", "shapes"), "shapes stands alone"),
        (("table1", "--scale", "huge"), "scale 'huge' does not exist"),
    ],
)
def test_bad_input_is_one_line(
    run: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], message: str
) -> None:
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_shapes_are_written_too(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table itself is tested in test_shapes.py: it takes a while."""
    from informed_routing.study.paper import shapes
    from informed_routing.study.results import Value
    from informed_routing.study.tables import Block, Column, Row, Table

    row = Row("D-LLM", {"kv": Value(25.0)})
    table = Table("shapes", "Shapes", (Column("kv", "KV saved %"),), (Block("8B", (row,)),))
    monkeypatch.setattr(shapes, "shape_table", lambda: table)
    code, shown, _ = run("shapes", "--out", tmp_path, "-q")
    assert code == 0
    assert "| D-LLM | 25.00 |" in shown
    assert (tmp_path / "shapes.md").exists()
    assert "25.0" in (tmp_path / "shapes.csv").read_text()
