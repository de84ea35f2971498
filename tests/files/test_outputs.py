"""Files that a user asks for: nothing of the user's is replaced, devices and pipes get the content itself."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from informed_routing.errors import InputError, WorkError
from informed_routing.files import outputs
from informed_routing.files.outputs import check_output, descriptor, write_output


def ours(beginning: bytes) -> bool:
    return beginning.startswith(b"ours")


def test_regular_files(tmp_path: Path) -> None:
    for name, text in {"mine": "mine", "ours": "ours, old", "empty": ""}.items():
        (tmp_path / name).write_text(text)
    for name in ("new", "ours", "empty"):
        check_output("--json", tmp_path / name, ours)
        write_output(tmp_path / name, b"ours, new")
        assert (tmp_path / name).read_text() == "ours, new"
    with pytest.raises(InputError, match=r"--json .*mine exists already.*another file"):
        check_output("--json", tmp_path / "mine", ours)


@pytest.mark.parametrize(
    ("name", "said"),
    [("folder", "is a folder"), ("no/x", "does not exist"), ("file/x", ""), ("n" * 300, ""), ("a\0b", "")],
)
def test_places_that_cannot_be(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"--json .*{said}"):
        check_output("--json", f"{tmp_path}/{name}", ours)


def test_a_link_to_a_device_and_the_device_stay(tmp_path: Path) -> None:
    """Never the machine's own: a link to it shows what a rename would do."""
    (tmp_path / "null").symlink_to("/dev/null")
    check_output("--json", tmp_path / "null", ours)
    write_output(tmp_path / "null", b"x")
    assert (tmp_path / "null").is_symlink()
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_full_device_is_a_full_disk() -> None:
    check_output("--json", "/dev/full", ours)
    with pytest.raises(WorkError, match="no disk space left"):
        write_output("/dev/full", b"x")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_fifo_gets_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check_output("--json", fifo, ours)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    write_output(fifo, b"x" * 100_000)
    reader.join(10)
    assert found == [b"x" * 100_000]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    monkeypatch.setattr(outputs, "READER_SECONDS", 0.0)
    with pytest.raises(WorkError, match="nothing reads"):
        write_output(fifo, b"x")


def test_open_descriptors(tmp_path: Path) -> None:
    """As in `--json >(jq)` and `--json /dev/stderr 2> log`."""
    assert [descriptor(t) for t in ("/dev/stdout", "/dev/fd/63", "/proc/self/fd/2", "x", "/dev/null")] == [
        1,
        63,
        2,
        None,
        None,
    ]
    read, write = os.pipe()
    check_output("--json", f"/dev/fd/{write}", ours)
    write_output(f"/dev/fd/{write}", b"content")
    os.close(write)
    assert os.read(read, 100) == b"content"
    with pytest.raises(InputError, match="not open for writing"):
        check_output("--json", f"/dev/fd/{read}", ours)
    os.close(read)
    with pytest.raises(InputError, match="is not open"):
        check_output("--json", "/dev/fd/987654", ours)
    with (tmp_path / "log").open("w") as log:
        log.write("before ")
        log.flush()
        write_output(f"/dev/fd/{log.fileno()}", b"content")
    assert (tmp_path / "log").read_text() == "before content"


def test_a_reader_that_is_gone(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(WorkError, match="cannot write"):
        write_output(f"/dev/fd/{write}", b"x")
    os.close(write)
