from __future__ import annotations

import errno
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
