"""What is public: docs/api.md, `__all__` of the modules in it, and what documents import are one list."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.documents.extract import blocks

import informed_routing
from informed_routing.routed_model import RoutedModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]


def documented() -> dict[str, list[str]]:
    """The names of docs/api.md by module."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"## `(informed_routing[\w.]*)`", line):
            names = found.setdefault(heading[1], [])
        elif line.startswith("- "):
            listed, colon, about = line[2:].partition(": ")
            assert colon, line
            assert about, line
            names += re.findall(r"`([\w.]+)`", listed)
    return found


PUBLIC = documented()
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


def value(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    return found


@pytest.mark.parametrize("module", list(PUBLIC))
def test_a_documented_module_exports_what_is_documented(module: str) -> None:
    names = [name for name in PUBLIC[module] if "." not in name]
    assert len(set(names)) == len(names)
    assert set(names) == set(importlib.import_module(module).__all__)


def test_top_level_names_are_all_loaded_on_first_use() -> None:
    assert set(informed_routing.__all__) == {*informed_routing._EXPORTS, "__version__"}
    for name, module in informed_routing._EXPORTS.items():
        assert value(f"informed_routing.{module}", name) is getattr(informed_routing, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        informed_routing.nothing  # noqa: B018


def test_public_methods_of_a_routed_model_are_documented() -> None:
    own = {
        f"RoutedModelForCausalLM.{name}"
        for part in RoutedModelForCausalLM.__mro__
        if part.__module__.startswith("informed_routing.")
        for name, member in vars(part).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod)))
    }
    assert own == {name for name in PUBLIC["informed_routing.routed_model"] if "." in name}


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_documented_name_has_a_docstring(module: str, name: str) -> None:
    found = value(module, name)
    function = found.__func__ if isinstance(found, classmethod) else found
    if not (inspect.isclass(function) or inspect.isroutine(function) or isinstance(function, property)):
        return  # constants and unions of types are described where they are documented
    assert (function.__doc__ or "").strip()


def test_documents_import_public_names_only() -> None:
    """`import informed_routing as ir` and what follows of it, too."""
    used = set()
    for block in blocks():
        if block.language != "python" or block.place.startswith("docs/how-to/"):  # guides change the package
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("informed_routing"):
                used |= {(node.module, alias.name) for alias in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ir":
                used.add(("informed_routing", node.attr))
    assert len(used) > 5
    assert used <= set(NAMES)


@pytest.mark.parametrize(("module", "heavy"), [("informed_routing", "pydantic"), ("informed_routing.cli", "yaml")])
def test_imports_are_light(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "informed_routing" in loaded
    assert not loaded & {heavy, "torch", "transformers", "numpy", "accelerate", "datasets", "matplotlib", "scipy"}
