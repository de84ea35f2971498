"""Help: every command has it, with an example, and it does not load torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.cli.conftest import Outcome

from informed_routing import __version__

COMMANDS = ("demo", "fit", "calibrate", "evaluate", "generate", "benchmark", "study", "prune", "inspect")
PARTS = {"whatif": ("measure", "predict", "check")}
SHARED = ("--json", "--seed", "--device", "--dtype", "--threads", "--quiet", "--debug")


@pytest.fixture(autouse=True)
def _wide_plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_the_shared_options(run, command: str) -> None:  # type: ignore[no-untyped-def]
    outcome: Outcome = run(command, "--help")
    assert outcome.code == 0
    assert f"Example: informed-routing {command}" in outcome.out
    for option in SHARED:
        assert option in outcome.out


@pytest.mark.parametrize(("command", "part"), [(command, part) for command in PARTS for part in PARTS[command]])
def test_help_of_every_part_of_a_command(run, command: str, part: str) -> None:  # type: ignore[no-untyped-def]
    outcome: Outcome = run(command, part, "--help")
    assert outcome.code == 0
    assert f"Example: informed-routing {command} {part}" in outcome.out
    for option in SHARED:
        assert option in outcome.out


def test_help_lists_the_commands(run) -> None:  # type: ignore[no-untyped-def]
    outcome: Outcome = run("--help")
    assert outcome.code == 0
    for command in (*COMMANDS, *PARTS):
        assert command in outcome.out


def test_version(run) -> None:  # type: ignore[no-untyped-def]
    assert run("--version").out.strip() == __version__


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["evaluate", "--help"], ["--version"]])
def test_help_loads_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys; from informed_routing.cli import main; "
        f"code = main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'peft'} & set(sys.modules); "
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
