"""Folders with one writer, which are replaced as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from informed_routing.errors import InputError
from informed_routing.files import folders
from informed_routing.files.folders import only_writer, put_folder

LAST = ("config", "result")
OURS = {"config", "result", "weights", "old-part", "checkpoints", "sub"}


def ours(name: str) -> bool:
    return name in OURS


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_new(folder: Path) -> None:
    for name in ("result", "config", "weights"):
        (folder / name).write_text("new")
    (folder / "sub").mkdir()
    (folder / "sub" / "part").write_text("new")


def make_old(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    for name in ("result", "config", "weights", "old-part", "sub/part", "sub/old", "notes"):
        (folder / name).write_text("old")
    (folder / "mine" / "deep").mkdir(parents=True)
    (folder / "mine" / "deep" / "file").write_text("old")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "begun").write_text("old")


NEW = {"result": "new", "config": "new", "weights": "new", "sub/part": "new"}
FOREIGN = {"notes": "old", "mine/deep/file": "old"}


@pytest.mark.parametrize("how", ["exchanged", "moved", "working directory"])
def test_a_folder_is_replaced_and_what_is_not_ours_stays(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make_old(out)
    before = out.stat().st_ino
    if how == "moved":
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    if how == "working directory":
        monkeypatch.chdir(out)
    put_folder(out, write_new, ours=ours, last=LAST)
    assert content(out) == {**NEW, **FOREIGN}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out.stat().st_ino == before) == (how != "exchanged")


def test_a_new_folder_and_one_that_holds_only_checkpoints(tmp_path: Path) -> None:
    put_folder(tmp_path / "a" / "b", write_new, ours=ours, last=LAST)
    assert content(tmp_path / "a" / "b") == NEW
    (tmp_path / "c" / "checkpoints").mkdir(parents=True)
    put_folder(tmp_path / "c", write_new, ours=ours, last=LAST)
    assert content(tmp_path / "c") == NEW
    assert not (tmp_path / "c" / "checkpoints").exists()


def test_a_failure_while_writing_leaves_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_old(out)
    old = content(out)

    def fail(folder: Path) -> None:
        write_new(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put_folder(out, fail, ours=ours, last=LAST)
    assert content(out) == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys, pathlib
sys.path.insert(0, sys.argv[3])
import test_folders as t
from informed_routing.files import folders
at, exchange, calls = int(sys.argv[2]), sys.argv[4] == "yes", 0
def killed(frame, event, argument):
    global calls
    if event in ("c_call", "call"):
        calls += 1
        if calls == at:
            os.kill(os.getpid(), 9)
if not exchange:
    folders._exchange = lambda *_: False
with folders.only_writer(pathlib.Path(sys.argv[1])) as out:
    sys.setprofile(killed)
    folders.put_folder(out, t.write_new, ours=t.ours, last=t.LAST)
    sys.setprofile(None)
print(calls)
"""


def _put(out: Path, at: int, exchange: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(out), str(at), str(Path(__file__).parent), "yes" if exchange else "no"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_call_leaves_old_or_new_or_what_can_be_repeated(tmp_path: Path, exchange: bool) -> None:
    """Where folders are exchanged there is always a whole result; elsewhere none, or a whole one."""
    make_old(tmp_path / "whole")
    done = _put(tmp_path / "whole", 0, exchange)
    calls = int(done.stdout)
    for at in range(1, calls + 1, max(calls // 30, 1)):
        out = tmp_path / f"killed-{at}"
        make_old(out)
        old = content(out)
        assert _put(out, at, exchange).returncode == -signal.SIGKILL
        found = content(out)
        assert {name: found.get(name) for name in FOREIGN} == FOREIGN
        mine = {k: v for k, v in found.items() if k not in FOREIGN and not k.startswith((".", "checkpoints"))}
        whole = [NEW, {k: v for k, v in old.items() if k not in FOREIGN and not k.startswith("checkpoints")}]
        if exchange or "result" in mine:
            assert mine in whole, at
        else:
            assert (out / "checkpoints" / "begun").exists()
        assert _put(out, 0, exchange).returncode == 0
        assert content(out) == {**NEW, **FOREIGN}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with only_writer(out) as first:
        assert first == out
        with pytest.raises(InputError, match=r"another run is writing into .*out.*another --out"), only_writer(out):
            pass
        with only_writer(tmp_path / "deep" / "other"):
            pass
        with pytest.raises(InputError, match="another run"), only_writer(tmp_path / "deep" / "." / "out"):
            pass
    with only_writer(out):
        pass
    assert list(tmp_path.iterdir()) == []  # neither locks nor folders stay of a run that wrote nothing


HOLDER = """
import sys, time, pathlib
from informed_routing.files.folders import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another run"), only_writer(out):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / ".out.lock").exists()
    with only_writer(out):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["a file", "below a file", "a long name", "a null", "the root"])
def test_folders_that_cannot_be_are_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    places: dict[str, Any] = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "out",
        "a long name": tmp_path / "made" / ("n" * 300) / "out",
        "a null": Path("a\0b"),
        "the root": Path("/"),
    }
    with pytest.raises(InputError), only_writer(places[where]):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written_to(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_old(out)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InputError, match="cannot be written"), only_writer(tmp_path / "new"):
            pass
        with only_writer(out):
            with pytest.raises(InputError, match="another run"), only_writer(out):
                pass
            put_folder(out, write_new, ours=ours, last=LAST)
        assert content(out) == {**NEW, **FOREIGN}
    finally:
        tmp_path.chmod(0o755)
