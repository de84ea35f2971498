"""`make compat`: which environments it makes, what it measures anew, and what the table says; pip and pytest faked."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compat
import pytest
from packaging.requirements import Requirement

from informed_routing.errors import WorkError

REPORT = """<testsuites><testsuite>
<testcase classname="tests.models.test_parity" name="test_one"/>
<testcase classname="tests.models.test_parity" name="test_two[llama]">{outcome}</testcase>
<testcase classname="tests.models.test_parity" name="test_three"><skipped message="no compiler"/></testcase>
</testsuite></testsuites>"""


class Shell:
    """Answers what compat.py runs: pip fetches and installs any version, pytest passes unless told otherwise."""

    def __init__(self) -> None:
        self.newest = {"transformers": "9.1.0", "peft": "8.0", "accelerate": "7.0", "lm-eval": "6.0"}
        self.failing: set[str] = set()
        self.broken: set[str] = set()
        self.commands: list[list[str]] = []
        self.versions: dict[str, dict[str, str]] = {}

    def count(self, word: str) -> int:
        return sum(word in command for command in self.commands)

    def __call__(self, command: Sequence[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command))
        output, code = "", 0
        if "download" in command:
            one = Requirement(command[-1])
            exact = str(one.specifier).removeprefix("==").replace("*", "2") or self.newest[one.name]
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{one.name.replace('-', '_')}-{exact}-py3-none-any.whl").touch()
        elif "venv" in command:
            folder = Path(command[-1])
            (folder / "bin").mkdir(parents=True)
            (folder / "bin" / "python").touch()
            (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        elif "install" in command:
            pairs = [part.split("==") for part in command if part.partition("==")[0] in compat.PACKAGES]
            self.versions[command[0]] = dict(pairs)
        elif "-c" in command:
            output = json.dumps({**dict.fromkeys(compat.RECORDED, "1.0"), **self.versions[command[0]]})
        elif "pytest" in command:
            assert variables["OMP_NUM_THREADS"] == "1"
            name = Path(command[0]).parent.parent.name
            code = 3 if name in self.broken else 1 if name in self.failing else 0
            output = "INTERNALERROR" if code == 3 else ""
            report = next(part for part in command if part.startswith("--junitxml=")).partition("=")[2]
            outcome = "<failure message='other text'/>" if code else ""
            if code != 3:
                Path(report).write_text(REPORT.format(outcome=outcome), encoding="utf-8")
        return subprocess.CompletedProcess(list(command), code, output, "")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setattr(compat, "code", lambda: "0123")
    return Shell()


def run(tmp_path: Path, shell: Shell, *arguments: str) -> int:
    return compat.main([*arguments, "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")], shell)


def rows(tmp_path: Path) -> dict[str, Any]:
    found = json.loads((tmp_path / "docs" / "data" / "compat.json").read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row for row in found}


def test_the_table_has_a_row_for_each_environment(tmp_path: Path, shell: Shell) -> None:
    shell.failing = {"newest"}
    assert run(tmp_path, shell) == 1, "failures are an exit code"
    found = rows(tmp_path)
    assert list(found) == ["oldest", "5.20", "pinned", "newest"]
    pinned = compat.pins(compat.ROOT / "constraints.txt")
    assert f"=={found['pinned']['versions']['transformers']}" == pinned["transformers"]
    assert found["oldest"]["versions"]["transformers"].startswith("5.16")
    assert found["5.20"]["versions"]["transformers"] == "5.20.2"
    assert found["newest"]["versions"]["lm-eval"] == "6.0"
    suite = found["newest"]["suites"]["families"]
    assert (suite["passed"], suite["failed"], suite["skipped"]) == (1, 1, 1)
    assert suite["failures"] == ["tests/models/test_parity.py::test_two[llama]"]
    text = (tmp_path / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert "| newest | 9.1.0 | 1, **1 failed**, 1 skipped |" in text
    assert "| pinned | " in text
    assert "| 2, 1 skipped |" in text
    assert "## Failures in *newest*" in text
    assert "## Failures in *pinned*" not in text
    assert str(tmp_path) not in text


def test_what_is_there_is_not_made_again(tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = len(compat.SUITES)
    assert run(tmp_path, shell, "pinned") == 0
    assert (shell.count("venv"), shell.count("pytest")) == (1, suites)
    run(tmp_path, shell, "pinned")
    assert (shell.count("venv"), shell.count("pytest")) == (1, suites)
    run(tmp_path, shell, "pinned", "--again")
    assert (shell.count("venv"), shell.count("pytest")) == (2, 2 * suites)
    monkeypatch.setattr(compat, "code", lambda: "4567")
    run(tmp_path, shell, "pinned")
    assert (shell.count("venv"), shell.count("pytest")) == (2, 3 * suites), "other code is measured anew"


def test_a_newer_release_is_noticed(tmp_path: Path, shell: Shell) -> None:
    run(tmp_path, shell, "newest")
    shell.newest["transformers"] = "9.2.0"
    run(tmp_path, shell, "newest")
    assert shell.count("venv") == 2
    assert rows(tmp_path)["newest"]["versions"]["transformers"] == "9.2.0"


def test_an_interrupted_row_goes_on(tmp_path: Path, shell: Shell) -> None:
    seen = 0

    def interrupted(command: Sequence[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        nonlocal seen
        seen += "pytest" in command
        if seen == 3:
            raise KeyboardInterrupt
        return shell(command, variables)

    with pytest.raises(KeyboardInterrupt):
        compat.main(["oldest", "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")], interrupted)
    run(tmp_path, shell, "oldest")
    assert shell.count("pytest") == len(compat.SUITES)
    assert set(rows(tmp_path)["oldest"]["suites"]) == set(compat.SUITES)


def test_a_suite_that_did_not_run_is_no_success(tmp_path: Path, shell: Shell) -> None:
    shell.broken = {"pinned"}
    assert run(tmp_path, shell, "pinned") == 1
    assert "exit code 3: INTERNALERROR" in rows(tmp_path)["pinned"]["suites"]["families"]["error"]
    assert "**did not run**" in (tmp_path / "docs" / "compatibility.md").read_text(encoding="utf-8")


def test_unknown_names_and_failing_pip_end_in_one_line(
    tmp_path: Path, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, shell, "older") == 2
    assert "no environment is called 'older'. Known: oldest, 5.20, pinned, newest" in capsys.readouterr().err

    def offline(command: Sequence[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(list(command), 1, "", "WARNING: retry\nERROR: no matching distribution\n")

    assert compat.main(["newest", "--out", str(tmp_path)], offline) == 1
    assert "pip cannot fetch transformers: ERROR: no matching distribution" in capsys.readouterr().err


def test_every_suite_has_files_and_no_file_is_in_two(tmp_path: Path) -> None:
    found = [name for suite in compat.SUITES for name in compat.files_of(suite)]
    assert len(found) == len(set(found))
    assert {"tests/models/test_parity.py", "tests/execution/test_native.py"} <= set(found)
    with pytest.raises(WorkError, match="has no test files"):
        compat.files_of("families", tmp_path)
