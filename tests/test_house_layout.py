"""Tests have the folders that the package has."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {"benchmarks", "documents", "fuzz", "integration"}
"""Folders of tests without a package: scripts, documents, seeded mutations, and whole pipelines."""


def folders(top: Path) -> set[str]:
    """The folders in `top` that hold Python files."""
    return {path.name for path in top.iterdir() if any(path.glob("*.py"))}


def test_every_package_has_its_folder_of_tests() -> None:
    packages = folders(ROOT / "src" / "informed_routing")
    assert len(packages) > 10
    tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert packages <= tested
    assert folders(ROOT / "tests") - packages == OTHERS


def test_no_module_is_too_long_to_read() -> None:
    """Who needs more lines has a second idea in the file."""
    modules = (ROOT / "src").rglob("*.py")
    assert not [path.name for path in modules if len(path.read_text(encoding="utf-8").splitlines()) > 400]
