"""Every option of every command: what no command can take is refused before one begins, with the option's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
LONG = "x" * 300
PRUNE = ("prune", "x", "--method", "shortgpt", "-s", "0.2", "--out", "o")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "-p", "hi", "--temperature", "nan"], "--temperature nan is not a finite number"),
        (["generate", "x", "-p", "hi", "--temperature", "1e-39"], "--temperature 1e-39 is"),
        (["generate", "x", "-p", "hi", "--top-p", "inf"], "--top-p inf is not a finite number"),
        (["evaluate", "x", "--sparsity", "nan"], "--sparsity nan"),
        (["fit", "x", "--out", "o", "--sparsity", "1e999"], "--sparsity inf"),
        (["prune", "x", "--method", "shortgpt", "-s", "nan", "--out", "o"], "--sparsity nan"),
        (["whatif", "predict", "t", "--targets", "y", "--delta", "nan"], "--delta nan"),
        (["whatif", "predict", "t", "--targets", "y", "--tolerance", "inf"], "--tolerance inf"),
        (["evaluate", "x", "--limit", "9" * 30], "--limit 9"),
        (["generate", "x", "-p", "hi", "-n", str(2**40)], "--max-new-tokens 1099511627776 is out of range"),
        (["evaluate", "x", "--seed", "4294967296"], "--seed"),
        (["evaluate", "x", "--seed", "-1"], "--seed"),
        (["evaluate", "x", "--threads", "2147483648"], "--threads 2147483648 is above"),
        (["evaluate", "x", "--threads", "-3"], "--threads -3 is below 1"),
        *((["evaluate", "x", "--device", name], f"--device '{name}' is not known") for name in ("meta", "mps", "xpu")),
        *((["evaluate", "x", "--device", name], f"--device '{name}'") for name in ("cuda:x", "CUDA", "cpu:3", "hpu")),
        (["evaluate", "x", "--device", "cuda:999"], "--device cuda:999 is not available"),
        (["fit", "x", "--out", ""], "--out is empty"),
        (["fit", "x", "--out="], "--out is empty"),
        (["evaluate", ""], "an argument is empty"),
        (["evaluate", "a\0b"], r"MODEL_OR_DIR 'a\x00b' holds a control character"),
        (["evaluate", "a\udcff"], r"MODEL_OR_DIR 'a\udcff' is not UTF-8 text"),
        (["evaluate", "a\x1b[31m"], "holds a control character"),
        (["generate", "x", "-p", "a\udcff"], "--prompt"),
        (["generate", "x", "-p", "a\0b"], "--prompt"),
        (["evaluate", "~nosuchuser/x"], "home folder"),
        (["fit", "x", "--out", "~nosuchuser/x"], "--out '~nosuchuser/x'"),
        (["evaluate", LONG], "File name too long"),
        (["fit", "--recipe", LONG, "--out", "o"], "File name too long"),
        (["study", LONG], "File name too long"),
        ([*PRUNE, "--set", "keep_first=["], "--set keep_first"),
        ([*PRUNE, "--set", "context=.inf"], "--set context"),
        (["prune", "x", "--method", "nope", "-s", "0.2", "--out", "o"], "--method 'nope' is not known"),
        *(
            ([*PRUNE, "--set", f"{name}=1"], f"--set {name}")
            for name in ("method", "model", "rows", "sparsity", "progress", "self", "x")
        ),
        ([*PRUNE, "--set", "keep_first=-1"], "--set keep_first"),
        ([*PRUNE, "--set", "batch_size=true"], "--set batch_"),
        (["study", "table1", "--dry-run", "--speed"], "--speed and --dry-run exclude each other"),
        (["study", "table1", "--tables-only", "--ray"], "--ray has no effect"),
        (["study", "shapes", "--limit", "3"], "--limit has no effect on shapes"),
        (["study", "table1", "--model", "nowhere/at/all", "--out", "o"], "nowhere/at/all"),
    ],
)
def test_values_that_no_command_takes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in run(*arguments).one_line_error()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", [False, True])
def test_results_that_would_lie_in_a_file(run: Run, tmp_path: Path, below: bool) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    out = file / "x" if below else file
    for arguments in (["study", "table1"], ["demo"], ["whatif", "check", "r", "t", "--targets", "y"]):
        assert "--out" in run(*arguments, "--out", out).one_line_error()
    plot = ["whatif", "predict", "t", "--targets", "y", "--plot"]
    assert "--plot" in run(*plot, file / "x.svg").one_line_error()
    assert "--plot" in run(*plot, tmp_path).one_line_error()
    assert file.read_text() == "mine"


def test_paths_are_the_users_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell replaces `~` in `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("[")
    assert str(tmp_path) in run("whatif", "predict", "t", "--targets=~/mine.yaml", "--plot=~").one_line_error()


def test_a_built_in_recipe_is_used_beside_a_folder_of_its_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    said = run("fit", "nowhere/at/all", "--recipe", "demo", "--out", "out").one_line_error()
    assert "nowhere/at/all" in said


def test_an_error_is_one_plain_line_however_long_or_odd(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: " + "y" * 100_000)
    assert len(run("fit", "--recipe", recipe, "--out", tmp_path / "out").one_line_error()) < 1500
    assert "\x1b" not in run("study", "a\x1b[31mb").one_line_error()
