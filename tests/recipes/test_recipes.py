"""What a name means: first what comes with the package, then a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from informed_routing.errors import InputError
from informed_routing.recipes import packaged_recipes, recipe_path
from informed_routing.study.grid import load_grid


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_built_in_names_come_before_what_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "table1"):
        (tmp_path / name).mkdir() if kind == "folder" else (tmp_path / name).write_text("model: [")
    assert recipe_path("demo") == packaged_recipes()["demo"]
    assert load_grid("table1").name == "table1"
    with pytest.raises(InputError, match=r"recipe 'demo.yaml' does not exist. Built in is `demo`"):
        recipe_path("demo.yaml")
    (tmp_path / "demo.yaml").write_text("model: mine")
    assert recipe_path("demo.yaml").resolve() == tmp_path / "demo.yaml"
    if kind == "folder":
        with pytest.raises(InputError, match=r"recipe \./demo is a folder"):
            recipe_path("./demo")
    else:
        assert recipe_path("./demo").samefile(tmp_path / "demo")
