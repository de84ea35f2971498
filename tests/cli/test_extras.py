"""What is an extra is asked for by one line, and what is none works without it."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from tests.cli.conftest import Outcome

from informed_routing import extras
from informed_routing.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("arviz_stats", "datasets", "lm_eval", "matplotlib", "pyarrow", "ray", "scipy", "zstandard")
"""Those that only extras bring."""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no extra was installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in MODULES else found(name))


def test_what_is_missing_is_named_with_its_extra(bare: None) -> None:
    extras.need("numpy", extra="whatif", for_what="Tables")
    with pytest.raises(extras.MissingExtra) as error:
        extras.need("numpy", "scipy", "pyarrow", extra="whatif", for_what="Tables")
    assert str(error.value) == (
        "Tables need scipy, pyarrow, not installed here. Run: pip install 'informed-routing[whatif]'"
    )
    assert isinstance(error.value, InputError)
    assert isinstance(error.value, ImportError)
    assert error.value.exit_code == 2


def asked() -> Iterator[tuple[str, str]]:
    """(module, extra) of every call of `need` in the package."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need":
                extra = next(word.value.value for word in node.keywords if word.arg == "extra")  # type: ignore[attr-defined]
                yield from ((part.value, extra) for part in node.args)  # type: ignore[attr-defined]


def declared() -> dict[str, set[str]]:
    """The modules of each extra, those of the extras in it included."""
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

    def modules(extra: str) -> set[str]:
        found: set[str] = set()
        for one in map(Requirement, listed[extra]):
            inner = [modules(name) for name in one.extras] if one.name == "informed-routing" else []
            found |= set().union(*inner) if inner else {one.name.replace("-", "_")}
        return found

    return {extra: modules(extra) for extra in listed}


def test_extras_hold_what_is_asked_of_them() -> None:
    known, calls = declared(), set(asked())
    assert {module for module, _ in calls} == set(MODULES)
    assert {(module, extra) for module, extra in calls if module not in known[extra]} == set()
    assert known["all"] <= known["dev"]
    assert set(MODULES) - {"ray"} <= known["all"]


def test_the_main_commands_need_none(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """In a process where importing one of them fails: fit, generate, evaluate, and the help."""
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    stage = {"steps": 1, "batch_size": 2, "sequence_length": 16}
    calibration = {"tokens": 64, "sequence_length": 16, "targets": [0.2]}
    forecaster, router = {"rank": 2, "tokens": 64}, {"kind": "linear", "warm_start_tokens": 32, "sweeps": 0}
    parts = {"forecaster": forecaster, "router": router, "route": stage, "calibration": calibration}
    recipe.write_text(yaml.safe_dump({"dtype": "float32", "forecast": {"sequence_length": 16}, **parts}))
    common = ("--data", str(text_file), "-q", "--threads", "1")
    commands = [
        ["--help"],
        ["fit", str(tiny_folder), "--recipe", str(recipe), "--out", str(out), *common],
        ["generate", str(out), "--prompt", "the river", "--max-new-tokens", "2", "-q"],
        ["evaluate", str(out), "--sparsity", "0.2", *common],
    ]
    code = f"""
import json, sys
for module in {MODULES!r}:
    sys.modules[module] = None
from informed_routing.cli import main
for command in json.loads(sys.argv[1]):
    if main(command):
        sys.exit(" ".join(command))
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("fit", "MODEL", "--data", "x.parquet", "--out", "new"), "data"),
        (("fit", "MODEL", "--data", "x.jsonl.zst", "--out", "new"), "data"),
        (("fit", "MODEL", "--data", "someone/texts:en", "--out", "new"), "data"),
        (("prune", "MODEL", "--method", "shortgpt", "-s", "0.3", "--data", "x.parquet", "--out", "new"), "data"),
        (("evaluate", "FOLDER", "--data", "x.parquet"), "data"),
        (("evaluate", "FOLDER", "--tasks", "boolq"), "eval"),
        (("whatif", "measure", "FOLDER", "--workload", "w.yaml", "--out", "new"), "whatif"),
        (("whatif", "predict", "x.parquet", "--targets", "w.yaml"), "whatif"),
        (("whatif", "check", "FOLDER", "x.parquet", "--targets", "w.yaml", "--out", "new"), "whatif"),
        (("study", "table1", "--out", "new"), "study"),
        (("study", "importance-sampling", "--out", "new"), "study"),
    ],
)
def test_commands_say_so_before_any_work(
    run: Callable[..., Outcome],
    bare: None,
    routing_folder: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    extra: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.parquet", "x.jsonl.zst"):
        Path(name).write_bytes(b"")
    places = {"MODEL": str(tiny_folder), "FOLDER": str(routing_folder)}
    error = run(*(places.get(one, one) for one in arguments), "-q").one_line_error()
    assert f"not installed here. Run: pip install 'informed-routing[{extra}]'" in error
    assert not Path("new").exists()


def test_plots_are_asked_for_by_themselves(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    arguments = ("--targets", tmp_path / "targets.yaml", "--plot", tmp_path / "plot.svg")
    error = run("whatif", "predict", tmp_path / "table.parquet", *arguments, "-q").one_line_error()
    assert "Plots need matplotlib" in error
    assert "informed-routing[plots]" in error
