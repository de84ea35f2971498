"""The fuzz suite: a smoke of a few dozen mutations, the whole of it with `make slow`, and the oracle itself."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.fuzz import suite
from tests.fuzz.case import OTHER, SAME, TABLE, Case, Right, refused
from tests.fuzz.commands import COMMANDS
from tests.fuzz.oracle import Picture, Result, check, unreadable
from tests.fuzz.process import Outcome
from tests.fuzz.world import World

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, limits and devices of Linux")


def _module(name: str, tmp_path: Path, *arguments: str, timeout: float) -> dict[str, Any]:
    """Run a module of this package as a user would, and give its figures."""
    target = tmp_path / "figures.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", name, "--json", str(target), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert target.is_file(), done.stderr
    found: dict[str, Any] = json.loads(target.read_text())
    shown = "\n".join(line for line in done.stdout.splitlines() if "exit" not in line[:6])
    assert not found["faulty"], f"{shown}\n{done.stderr[-2000:]}"
    return found


def test_a_few_dozen_mutations(tmp_path: Path) -> None:
    """Those that take a moment; the numbers are those of seed 1."""
    found = _module("tests.fuzz", tmp_path, "--runs", "30", "--quick", timeout=200)
    assert found["runs"] == 30


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_mutations(tmp_path: Path) -> None:
    """INFORMED_ROUTING_FUZZ_RUNS and INFORMED_ROUTING_FUZZ_SEED choose others."""
    runs = os.environ.get("INFORMED_ROUTING_FUZZ_RUNS", "2000")
    seed = os.environ.get("INFORMED_ROUTING_FUZZ_SEED", "1")
    found = _module("tests.fuzz", tmp_path, "--runs", runs, "--seed", seed, timeout=7000)
    assert found["runs"] == int(runs)
    assert not any(found[name] for name in ("tracebacks", "hangs", "killed", "half files"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills(tmp_path: Path) -> None:
    """INFORMED_ROUTING_KILL_MOMENTS chooses another number for each command."""
    moments = os.environ.get("INFORMED_ROUTING_KILL_MOMENTS", "50")
    found = _module("tests.fuzz.kill", tmp_path, "--moments", moments, timeout=7000)
    assert all(one["identical"] == one["moments"] for one in found["commands"].values())


# -- the oracle sees what it is there for ---------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path: Path) -> Case:
    command = COMMANDS["fit"]
    return Case(World(tmp_path), command, random.Random(0), list(command.arguments), {})


def _faults(case: Case, right: Right, code: int, err: str = "", before: Picture | None = None) -> list[str]:
    outcome = Outcome(code, "", err, 0.1)
    return check(case, right, outcome, before or Picture({}), Picture.of(case.folder), Result())


@pytest.mark.parametrize(
    ("code", "err", "fault"),
    [
        (-7, "", "killed by SIGBUS"),
        (3, "", "exit code 3"),
        (1, "error: the disk is full\n", "right is 2"),
        (2, "error: --rank 0 is bad\nmore\n", "does not end in one error line"),
        (2, "noise\nerror: --rank 0 is bad\n", "-q, and 2 lines"),
        (2, "", "does not end in one error line"),
        (2, "error: KeyError: 'x'. Run again with --debug to see where\n", "an internal error"),
        (2, "Traceback (most recent call last)\nerror: --rank 0 is bad\n", "traceback"),
        (2, "error: something was bad\n", "names none of --rank"),
        (0, "", "right is 2"),
    ],
)
def test_the_oracle_knows_a_bad_end(case: Case, code: int, err: str, fault: str) -> None:
    assert any(fault in found for found in _faults(case, refused("--rank"), code, err))
    assert not _faults(case, refused("--rank"), 2, "error: --rank 0 is below 1. Give 1 or more\n")


def test_the_oracle_knows_half_files_and_strangers(case: Case) -> None:
    out = case.folder / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "fit.json").write_text('{"stages": ')
    (out / "routing.safetensors").write_bytes(b"\0" * 20)
    (out / ".fit.json.abc").write_text("")
    (case.folder / "recipe.yaml").write_text("rank: 1")
    found = _faults(case, OTHER, 0, before=Picture({"recipe.yaml": "another hash"}))
    for said in ("half-written: out/fit.json", "half-written: out/routing.safetensors", "litter after success"):
        assert any(said in fault for fault in found)
    assert "recipe.yaml was changed, it is no output" in found
    assert any("left by a refused command" in fault for fault in _faults(case, refused(), 2, "error: it is bad\n"))


def test_the_oracle_compares_results(case: Case) -> None:
    (case.folder / "out.json").write_text('{"result": {"loss": null, "seconds": 3.0, "nan": 1e999}}')
    found = _faults(case, SAME, 0)
    assert any("null where a number was asked for: .loss" in fault for fault in found)
    assert any(fault.startswith("another result") for fault in found)
    assert any(fault.startswith("not finite: result.nan") for fault in found)
    (case.folder / "nan.json").write_text("[NaN]")
    assert unreadable(case.folder / "nan.json")


def test_every_mutation_is_a_function_of_its_number(tmp_path: Path) -> None:
    """The same draw for the same number, other draws for another seed, and every mutator in its turn."""
    one, other = suite.Suite(tmp_path / "one", 1), suite.Suite(tmp_path / "other", 2)
    names = [one.name(number) for number in range(len(TABLE))]
    assert names == [one.name(number) for number in range(len(TABLE))]
    assert names != [other.name(number) for number in range(len(TABLE))]
    assert len({name.split()[0] for name in names}) == len({entry.name for entry in TABLE})
