"""Writes are whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from informed_routing.errors import WorkError
from informed_routing.files import write_atomically, write_several, write_text


def test_several_files_arrive_together_and_replace_old_ones(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / ".new-killed").mkdir()

    def save(folder: Path) -> None:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")

    write_several(tmp_path, save)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def full(path: Path) -> None:
        target = path / "a" if path.is_dir() else path
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_several(tmp_path, full)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(WorkError, match="no disk space left"):
        write_atomically(tmp_path / "a", full)
    assert (tmp_path / "a").read_text() == "old"
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
