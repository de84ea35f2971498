"""`--json` and `--plot`: results reach pipes and devices, and no file of the user's is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Outcome

from informed_routing.cli.envelope import check_apart, check_target, is_stdout, write_json
from informed_routing.errors import InputError

Run = Callable[..., Outcome]
RESULT = {"informed_routing": "0", "command": "x", "result": {"loss": 1.5, "name": "é\udc80"}}


@pytest.fixture
def evaluate(run: Run, tiny_folder: Path, text_file: Path) -> Callable[..., Outcome]:
    text = ["--data", text_file, "--split", "all", "--sequence-length", 64, "-q"]
    return lambda *more: run("evaluate", tiny_folder, *text, *more)


def test_a_rerun_replaces_its_own_result_and_nothing_else(evaluate: Callable[..., Outcome], tmp_path: Path) -> None:
    out, mine = tmp_path / "out.json", tmp_path / "mine.json"
    for _ in range(2):
        assert evaluate("--json", out).code == 0
        assert json.loads(out.read_text())["command"] == "evaluate"
    for text in ('{"mine": 1}', "notes", '{"result": {"informed_routing": 1}}'):
        mine.write_text(text)
        error = evaluate("--json", mine).one_line_error()
        assert "mine.json exists already" in error
        assert "another file" in error
        assert mine.read_text() == text


def test_stdout_by_its_name_is_as_good_as_a_dash(evaluate: Callable[..., Outcome]) -> None:
    assert evaluate("--json", "/dev/stdout").json["command"] == "evaluate"
    assert [is_stdout(target) for target in ("-", "/dev/fd/1", "out.json", None)] == [True, True, False, False]


def test_a_fifo_and_a_device(evaluate: Callable[..., Outcome], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_text()))
    reader.start()
    outcome = evaluate("--json", fifo)
    reader.join(20)
    assert outcome.code == 0, outcome.err
    assert json.loads(found[0])["command"] == "evaluate"
    (tmp_path / "null").symlink_to("/dev/null")
    assert evaluate("--json", tmp_path / "null").code == 0
    assert (tmp_path / "null").is_char_device()


def test_process_substitution(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    program = "import sys; from informed_routing.cli import main; sys.exit(main())"
    script = (
        f"'{sys.executable}' -c '{program}' evaluate '{tiny_folder}' --data '{text_file}' --split all "
        f"--sequence-length 64 -q --json >(cat > '{tmp_path}/copy') && wait $!"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "copy").read_text())["command"] == "evaluate"


def test_json_that_another_option_writes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--json .*x is what --out writes"):
        check_apart(str(tmp_path / "x"), {"out": tmp_path / "x"})
    with pytest.raises(InputError, match=r"--json .*x is what --plot writes"):
        check_apart(str(tmp_path / "x"), {"out": None, "plot": tmp_path / "x"})
    check_apart(str(tmp_path / "x"), {"out": str(tmp_path)})
    check_apart("-", {"out": Path("-")})


def test_text_that_is_no_unicode_stays_json(tmp_path: Path) -> None:
    write_json(tmp_path / "out.json", RESULT)
    check_target(str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())["result"] == {"loss": 1.5, "name": "é\udc80"}


def test_a_plot_replaces_only_a_plot(tmp_path: Path) -> None:
    from informed_routing.whatif.plot import check_plot, draw
    from informed_routing.whatif.predictions import Predictions

    check_plot(None)
    row = type("Row", (), {"metric": "m", "target": "t", "lower": 0.0, "upper": 1.0, "colour": "red", "estimate": None})
    found = type("Found", (Predictions,), {"__init__": lambda self: None, "rows": [row]})()
    for _ in range(2):
        check_plot(tmp_path / "p.svg")
        draw(found, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    (tmp_path / "mine.svg").write_text("<svg/>")
    with pytest.raises(InputError, match=r"--plot .*mine\.svg exists already"):
        check_plot(tmp_path / "mine.svg")
