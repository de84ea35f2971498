"""Writes are whole or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from informed_routing.assets import cache
from informed_routing.errors import WorkError
from informed_routing.files import atomic as files
from informed_routing.files.atomic import write_atomically, write_several, write_tensors, write_text


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


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_permissions_are_those_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    """Also of libraries that make files for their owner alone, and of whole folders."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
        write_several(tmp_path, lambda folder: save_file({"a": torch.zeros(2)}, folder / "several"))
        built = tmp_path / "built"
        built.mkdir()
        save_file({"a": torch.zeros(2)}, built / "model.safetensors")
        cache.publish(built, tmp_path / "published")
    finally:
        os.umask(before)
    paths = [tmp_path / "published" / "model.safetensors", *(tmp_path / n for n in ("text", "tensors", "several"))]
    assert {path.name: path.stat().st_mode & 0o777 for path in paths} == {path.name: mode for path in paths}


def test_a_replaced_file_keeps_its_permissions_and_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("a")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_name_of_255_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]


KILLED = """
import os, sys, pathlib
from informed_routing.files.atomic import write_atomically
def half(temporary):
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
write_atomically(pathlib.Path(sys.argv[1]), half)
"""


def test_what_killed_writers_left_goes_and_that_of_living_ones_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    assert done.returncode == -9
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(files, "_YOUNG", 0.0)

    def another_writes(temporary: Path) -> None:
        temporary.write_text("first")
        write_text(tmp_path / "a", "second")  # finds a folder whose owner lives
        assert temporary.exists()

    write_atomically(tmp_path / "a", another_writes)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first"}
