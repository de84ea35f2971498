from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from informed_routing.assets import cache
from informed_routing.errors import WorkError


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("INFORMED_ROUTING_CACHE")
    assert cache.cache_dir() == tmp_path / "xdg" / "informed-routing"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "informed-routing"


def test_scratch_is_removed_after_success_failure_and_kill(tmp_path: Path) -> None:
    target = tmp_path / "model"
    dead = tmp_path / ".model.tmp-dead"  # left by a killed process
    dead.mkdir()
    (dead / "half").write_text("half")

    def interrupted() -> None:
        with cache.scratch_beside(target) as scratch:
            assert not dead.exists()
            (scratch / "part").write_text("x")
            raise KeyboardInterrupt

    with cache.locked(target), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_publish_replaces_a_damaged_folder(tmp_path: Path) -> None:
    target, built = tmp_path / "model", tmp_path / "built"
    target.mkdir()
    (target / "old").touch()
    built.mkdir()
    (built / "new").write_text("whole")
    cache.publish(built, target)
    assert [path.name for path in target.iterdir()] == ["new"]


def test_full_disk_names_the_remedy() -> None:
    with pytest.raises(WorkError, match=r"Failed while writing x: No space left.*INFORMED_ROUTING_CACHE"):
        with cache.disk_errors("writing x"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_records_that_are_damaged_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "prices" / "a.json"
    assert cache.read_record(path) is None
    cache.write_record(path, {"rows": [1, 2], "rate": 0.5})
    assert cache.read_record(path) == {"rows": [1, 2], "rate": 0.5}
    whole = path.read_text()
    for damaged in ("", "{}", "[]", "null", whole[:-5], whole.replace("0.5", "0.6"), "[" * 100_000):
        path.write_text(damaged)
        assert cache.read_record(path) is None
    (tmp_path / "file").write_text("")
    cache.write_record(tmp_path / "file" / "b.json", {})  # a cache that cannot be written to is none


def test_folders_of_the_cache_are_never_open_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "deep" / "cache"))
    for umask, mode in ((0, 0o775), (0o077, 0o700)):
        folder = tmp_path / "deep" / "cache" / f"{umask}" / "inner"
        before = os.umask(umask)
        try:
            cache.make_cache_folder(folder)
        finally:
            os.umask(before)
        assert folder.stat().st_mode & 0o777 == mode
        cache.check_trusted(folder)
