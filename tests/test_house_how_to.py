"""The guides of docs/how-to are followed as they stand, in a copy of the repository: what they add works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.documents.extract import blocks
from tests.test_house_imports import PROGRAM, lint

from informed_routing.assets.cache import CACHE_VARIABLE
from informed_routing.execution.cpu.build import FLAGS_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
LONGEST = 60  # lines


@dataclass(frozen=True)
class Change:
    """A block of a guide: a new file, or lines for one that is there, at the one line that begins like `line`."""

    path: str
    how: str | None
    """`after` that line, or `instead of` it."""
    line: str | None
    text: str

    def apply(self, root: Path) -> None:
        path = root / self.path
        if self.line is None:
            assert not path.exists(), f"{self.path} is there already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text, encoding="utf-8")
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        places = [place for place, line in enumerate(lines) if line.strip().startswith(self.line)]
        assert len(places) == 1, f"{self.path} has {len(places)} lines that begin with {self.line}"
        lines[places[0] + (self.how == "after") : places[0] + 1] = [self.text]
        path.write_text("".join(lines), encoding="utf-8")


def changes(page: Path) -> list[Change]:
    """What a guide changes: each block begins with a comment that names its file."""
    found = []
    for block in blocks():
        if not block.place.startswith(f"{page.relative_to(ROOT).as_posix()}:") or not block.language:
            continue
        heading, _, text = block.text.partition("\n")
        match = re.fullmatch(r"(?:#|//) ([\w/.-]+)(?:, (after|instead of) `(.*)`)?", heading)
        assert match is not None, f"{block.place}: {heading} names no file"
        found.append(Change(match[1], match[2], match[3], text))
    return found


def test_there_is_a_guide_for_each_kind_of_part() -> None:
    assert {page.stem for page in PAGES} == {
        "decision-rule",
        "fallback",
        "family",
        "router",
        "stage",
        "task",
        "weight-format",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_guide_says_how_many_files_it_touches(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    touched = {change.path for change in changes(page) if not change.path.startswith("tests/")}
    said = re.search(r"Touches (\d+) files?\b", " ".join(text.split()))
    assert said is not None
    assert int(said[1]) == len(touched)


@pytest.mark.timeout(900)  # one of them compiles an engine
def test_what_the_guides_add_works(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = set()
    for page in PAGES:
        own = {change.path for change in changes(page) if change.path.startswith("tests/")}
        assert own, f"{page.stem} tests nothing"
        tests |= own
        for change in changes(page):
            change.apply(tmp_path)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    # The copy's native engine is another one: compiled quickly, and into a cache of its own.
    variables |= {FLAGS_VARIABLE: "-O0", CACHE_VARIABLE: str(tmp_path / "cache")}
    tests = {path for path in tests if Path(path).name.startswith("test_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(tests)]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    if PROGRAM.exists():
        code, said = lint(tmp_path / "src")
        assert code == 0, said
