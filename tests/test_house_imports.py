"""The floors of ARCHITECTURE.md hold, and the contract that says so notices what breaks them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path(sys.executable).with_name("lint-imports")
needs_linter = pytest.mark.skipif(not PROGRAM.exists(), reason="no import-linter")


def contracts() -> dict[str, dict[str, Any]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}


def lint(source: Path) -> tuple[int, str]:
    """(exit code, what was said) of the contracts over the package in the folder `source`."""
    variables = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "300"}
    command = [str(PROGRAM), "--no-logo", "--no-cache", str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package."""
    shutil.copytree(ROOT / "src" / "informed_routing", tmp_path / "informed_routing")
    return tmp_path


def add(source: Path, module: str, line: str) -> None:
    """Write a line of code at the end of a module."""
    path = source / "informed_routing" / Path(*module.split(".")).with_suffix(".py")
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")


@needs_linter
def test_the_package_keeps_its_contracts() -> None:
    code, said = lint(ROOT / "src")
    assert code == 0, said


@needs_linter
@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("errors", "from .files import atomic", "informed_routing.errors"),
        ("models.units", "from ..routing import router", "informed_routing.models"),
        ("execution.sparse", "def late():\n    from ..routed_model import RoutedModelForCausalLM", "routed_model"),
        ("training.loop", "from ..study import grid", "informed_routing.training"),
        ("whatif.predict", "from ..baselines import static", "informed_routing.baselines"),
    ],
)
def test_an_import_from_a_floor_above_is_reported(copy: Path, module: str, line: str, broken: str) -> None:
    add(copy, module, line)
    code, said = lint(copy)
    assert code == 1
    assert "A package imports only from floors below its own BROKEN" in said
    assert broken in said


@needs_linter
def test_a_cycle_is_reported(copy: Path) -> None:
    add(copy, "files.user_files", "def late():\n    from .bounded_yaml import parse_yaml")
    code, said = lint(copy)
    assert code == 1
    assert "need each other BROKEN" in said
    assert "No cycles are allowed in informed_routing.files" in said


@needs_linter
def test_the_paper_in_the_product_is_reported(copy: Path) -> None:
    add(copy, "study.report", "def late():\n    from .paper import claims")
    code, said = lint(copy)
    assert code == 1
    assert "The paper imports the product and never the other way BROKEN" in said


@needs_linter
def test_a_plot_on_the_way_to_inference_is_reported(copy: Path) -> None:
    add(copy, "execution.sparse", "def late():\n    import matplotlib.pyplot")
    code, said = lint(copy)
    assert code == 1
    assert "Inference needs neither training nor comparisons nor plots BROKEN" in said


@needs_linter
def test_a_package_without_a_floor_is_reported(copy: Path) -> None:
    (copy / "informed_routing" / "attic").mkdir()
    (copy / "informed_routing" / "attic" / "__init__.py").touch()
    code, said = lint(copy)
    assert code == 1
    assert "attic" in said


def test_every_folder_of_modules_is_a_package() -> None:
    """The linter does not see others."""
    source = ROOT / "src" / "informed_routing"
    folders = {path.parent for path in source.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_imports_by_name_which_no_linter_sees_are_few() -> None:
    source = ROOT / "src" / "informed_routing"
    found = {
        path.relative_to(source).as_posix() for path in source.rglob("*.py") if "import_module(" in path.read_text()
    }
    assert found == {
        "__init__.py",  # names on first use
        "config/kinds.py",  # a kind of router, rule, fallback or stage is a file of its name
        "persistence/registration.py",  # transformers asks for the routed classes
        "study/parallel.py",  # Ray
    }


ABOVE = ("training", "baselines", "evaluation", "study", "whatif", "cli")
INFERENCE = """
import sys
from tests.tiny import make_tiny, random_ids
from informed_routing import RoutedModelForCausalLM
from informed_routing.config import ForecasterConfig, RouterConfig
model = RoutedModelForCausalLM.attach(make_tiny("llama"), ForecasterConfig(rank=4), RouterConfig(kind="linear"))
model.save_pretrained(sys.argv[1])
again = RoutedModelForCausalLM.from_pretrained(sys.argv[1], base=make_tiny("llama"))
again.generate(random_ids(1, 4), max_new_tokens=2)
print(*sys.modules)
"""


def test_inference_loads_neither_training_nor_comparisons_nor_plots(tmp_path: Path) -> None:
    """Also by name, or of a package that another imports."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-c", INFERENCE, str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "informed_routing.execution.sparse" in loaded
    above = tuple(
        f"informed_routing.{name}" for name in ("training", "baselines", "evaluation", "study", "whatif", "cli")
    )
    assert not [name for name in loaded if name == "matplotlib" or name.startswith(above)]


def test_architecture_shows_the_floors_of_the_contract() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"^## Floors\n.*?^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    shown = [re.findall(r"[a-z_]+", line.split("  ")[0]) for line in block[1].splitlines() if line[:1].strip()]
    floors = [[name.strip() for name in layer.split("|")] for layer in reversed(contracts()["floors"]["layers"])]
    assert shown == floors


def test_files_that_architecture_names_are_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    there = [path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()]
    named = set(re.findall(r"[\w/*]+\.(?:py|cpp|h)\b", text))
    assert len(named) > 50
    patterns = {name: re.compile(rf"(?:.*/)?{re.escape(name).replace(re.escape('*'), '[^/]*')}") for name in named}
    assert not [name for name, pattern in patterns.items() if not any(pattern.fullmatch(path) for path in there)]


def test_each_arrow_of_the_main_path_is_an_import() -> None:
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("informed_routing", exclude_type_checking_imports=True, cache_dir=None)
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## The main path")[2].partition("\n## ")[0]
    arrows = re.findall(r"`([\w/]+)\.py`(?=\s+→\s+`([\w/]+)\.py`)", text)
    assert len(arrows) > 20

    def module(path: str) -> str:
        return "informed_routing." + path.removesuffix("/__init__").replace("/", ".")

    missing = [(a, b) for a, b in arrows if not graph.direct_import_exists(importer=module(a), imported=module(b))]
    assert not missing
