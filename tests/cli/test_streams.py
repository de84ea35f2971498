"""stdin, stdout and stderr that are closed, full, or of another encoding: one line, and the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from informed_routing.cli.progress import LineProgress, Stages, make_progress
from informed_routing.progress import NullProgress

PROGRAM = f"{sys.executable} -m informed_routing.cli"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="shells close streams")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("{} generate x -p - <&-", 2, "stdin is closed"),
        (r"printf '\xff' | {} generate x -p -", 2, "stdin is not UTF-8 text (byte 0)"),
        ("{} evaluate x >&-", 2, "stdout is closed"),
        ("{} evaluate x --sparsity nan 2>&-", 2, ""),
        ("{} evaluate x --sparsity nan 2>/dev/full", 2, ""),
        ("{} --version >/dev/full", 1, "no disk space left"),
        ("{} --help >/dev/full", 1, "no disk space left"),
        ("{} evaluate $'\\xff'", 2, "is not UTF-8 text"),
    ],
)
def test_streams_that_are_not_there(command: str, code: int, said: str) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = shell(command.format(PROGRAM))
    assert done.returncode == code, done.stderr
    lines = done.stderr.decode().splitlines()
    assert len(lines) == (1 if said else 0), lines
    assert said in "".join(lines)
    assert done.stdout == b""


@pytest.mark.slow
def test_a_reader_that_goes_early_costs_no_result(tmp_path: Path) -> None:
    command = f"{PROGRAM} study table1 --dry-run -q --json {tmp_path}/r.json"
    done = shell(f"{command} | true")
    assert done.returncode in (0, 1)
    assert done.stderr == b""
    assert len(json.loads((tmp_path / "r.json").read_text())["result"]["cells"]) == 19
    full = shell(f"{PROGRAM} study table1 --dry-run -q --json - > /dev/full")
    assert full.returncode == 1
    assert b"stdout cannot be written: no disk space left" in full.stderr


def test_json_on_a_stdout_that_holds_ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from informed_routing.cli.envelope import print_json

    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stream)
    print_json({"result": {"text": "é\udcff"}})
    assert json.loads(content.getvalue()) == {"result": {"text": "é\udcff"}}


def test_progress_that_nobody_reads_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        closed = False

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

    progress = Stages(LineProgress(Gone(), every=0))  # type: ignore[arg-type]
    progress.stage("route", 2)
    progress.advance(1)
    progress.message("still there")
    progress.done()
    assert "route" in progress.where
    monkeypatch.setattr("sys.stderr", None)
    assert isinstance(make_progress(quiet=False), NullProgress)
