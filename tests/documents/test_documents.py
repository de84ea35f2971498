"""Every command and every block of code that a document or a help text shows works, on tiny models."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.cli.conftest import Outcome
from tests.documents.conftest import LESS_TEXT
from tests.documents.extract import (
    LANGUAGES,
    PROGRAMS,
    ROOT,
    Block,
    Command,
    blocks,
    commands,
    documents,
    examples,
    fragments,
    make_targets,
)
from tests.documents.small import is_slow

from informed_routing.cli import app
from informed_routing.execution.cpu import build

Documented = Callable[..., Outcome]
ALL = commands()
OURS = [command for command in ALL if command.program == "informed-routing"]
MAKE = [command for command in ALL if command.program == "make"]
PYTHON = [command for command in ALL if command.program == "python"]
PIP = [command for command in ALL if command.program == "pip"]
GUIDES = "docs/how-to/"  # their code is for a copy of the repository: tests/test_house_how_to.py
CODE = [block for block in blocks() if block.language == "python" and not block.place.startswith(GUIDES)]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def by_text(command: Any) -> str:
    return str(command)


def test_everything_that_looks_like_a_command_is_known() -> None:
    unknown = [str(command) for command in ALL if command.program not in PROGRAMS]
    assert not unknown
    assert not [str(block) for block in blocks() if block.language not in LANGUAGES]
    assert {command.program for command in ALL} >= {"informed-routing", "make", "python"}
    assert len(OURS) > 25  # the documents have some dozens: an extraction that finds none proves nothing
    assert len(examples()) >= 15
    assert len(documents()) >= 10


@pytest.mark.parametrize("command", [c for c in OURS if not is_slow(c.words)], ids=by_text)
def test_documented_command(documented: Documented, command: Command) -> None:
    if {"--weights", "--profile"} & set(command.words) and build.compiler() is None:
        pytest.skip("no C++ compiler")
    documented(*command.words)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in OURS if is_slow(c.words)], ids=by_text)
def test_documented_command_that_takes_its_time(documented: Documented, command: Command) -> None:
    documented(*command.words)


@pytest.mark.parametrize("command", [*fragments(), *(c for c in OURS if "study" in c.words)], ids=by_text)
def test_options_of_a_part_of_a_command(command: Command) -> None:
    """`fit --resume` in a text: the command has these options, and those with choices have these values."""
    known: Any = typer.main.get_command(app)
    words = list(command.words[1:])
    while words and hasattr(known, "commands"):
        known = known.commands[words.pop(0)]
    options = {name: parameter for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for place, word in enumerate(words):
        if not re.match(r"--?[a-z]", word):
            continue
        assert word in options, f"{word} is no option of {command.words[1]}"
        choices = getattr(getattr(options[word], "type", None), "choices", None)
        following = words[place + 1] if place + 1 < len(words) else ""
        if choices and following and not following.startswith("-"):
            assert following in choices


@pytest.mark.parametrize("page", documents(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if ":" not in link and not (page.parent / link).exists()]


# -- make ----------------------------------------------------------------------------------------------------


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment as far as make knows: its stamp is newer than what it depends on."""
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / ".installed").touch()
    return folder


def recipe_of(*words: str) -> list[str]:
    """The lines that make would run."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.replace("\\\n", " ").splitlines() if not line.startswith("make")]


@needs_make
@pytest.mark.parametrize("command", MAKE, ids=by_text)
def test_documented_make_command(venv: Path, command: Command) -> None:
    assert recipe_of(*command.words[1:], f"VENV={venv}") or "install" in command.words


@needs_make
@pytest.mark.parametrize("target", make_targets())
def test_make_target(venv: Path, target: str) -> None:
    """What a target runs is there: scripts, modules and folders; what it hands to a shell is shell."""
    folder = venv / "none" if target == "install" else venv  # where nothing is installed, that is what it shows
    lines = recipe_of(target, f"VENV={folder}")
    assert lines
    for line in lines:
        assert subprocess.run(["sh", "-n", "-c", line], timeout=60).returncode == 0
        for script in re.findall(r"(?<=\s)[\w./-]+\.(?:py|sh)\b", line):
            assert (ROOT / script).is_file(), f"{target}: {script}"
        for module in re.findall(r"python3? -m ([\w.]+)", line):
            assert find_spec(module.split(".")[0]), f"{target}: {module}"


@needs_make
def test_make_demo_then_make_bench(documented: Documented, desk: Path, venv: Path) -> None:
    """In that order, whatever the fit gave: the benchmark takes shares that the demo's table has."""
    for target in ("demo", "bench"):
        for line in recipe_of(target, f"VENV={venv}"):
            program, found, arguments = line.partition("/informed-routing ")
            if found and program == f"{venv}/bin":
                outcome = documented("informed-routing", *arguments.split(), again=True)
                assert outcome.out
            else:
                assert subprocess.run(["sh", "-c", line], cwd=desk, timeout=60).returncode == 0, line
    assert "prefill" in outcome.out


@needs_make
def test_make_bench_without_a_demo_says_so(desk: Path, venv: Path) -> None:
    line = recipe_of("bench", f"VENV={venv}", "OUT=nowhere")[0]
    done = subprocess.run(["sh", "-c", line], cwd=desk, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "make demo" in done.stderr


@needs_make
def test_make_clean_removes_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = [".venv/x", "src/a/__pycache__/b.pyc", "tests/__pycache__/c.pyc", ".mypy_cache/d"]
    kept = ["src/a/b.py", "tests/c.py", "out/demo/routing_config.json"]
    for name in (*made, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
    assert not [name for name in made if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


# -- scripts, packages and code ------------------------------------------------------------------------------


def script_of(command: Command) -> Path:
    """The file that a `python` command runs."""
    if command.words[1] == "-m":
        module = ROOT / Path(*command.words[2].split("."))
        return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    return ROOT / command.words[1]


SCRIPTS = sorted({script_of(command) for command in PYTHON if command.words[1] != "-m"})


@pytest.mark.parametrize("command", PYTHON, ids=by_text)
def test_documented_script(command: Command) -> None:
    """It is there, is Python, and knows the words and options that it is given."""
    text = script_of(command).read_text(encoding="utf-8")
    ast.parse(text)
    for word in command.words[3 if command.words[1] == "-m" else 2 :]:
        if word == "..." or word.isupper() or word.isdigit() or "/" in word:
            continue  # placeholders, amounts and files
        assert re.search(rf"\b{re.escape(word.lstrip('-'))}\b", text), word


@pytest.mark.slow
@pytest.mark.parametrize("script", [path for path in SCRIPTS if "argparse" in path.read_text()], ids=lambda p: p.name)
def test_documented_script_has_help(script: Path) -> None:
    import sys

    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", PIP, ids=by_text)
def test_documented_package(command: Command) -> None:
    """The extras that are to be installed exist."""
    about = metadata("informed-routing")
    assert command.words[1] == "install"
    for name, extras in re.findall(r"([\w-]+)\[([\w,-]+)\]", " ".join(command.words)):
        assert name == about["Name"]
        assert set(extras.split(",")) <= set(about.get_all("Provides-Extra") or ())


@pytest.mark.parametrize("block", CODE, ids=by_text)
def test_documented_python(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for the model's name and the amount of training."""
    run_python(block.text, monkeypatch, desk)


def test_the_python_of_a_model_card(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (desk / "out" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    run_python(code.replace("this folder", "out"), monkeypatch, desk, keep="out")


def run_python(code: str, monkeypatch: pytest.MonkeyPatch, desk: Path, keep: str = "") -> None:
    import informed_routing
    from informed_routing.assets import load_tokenizer
    from informed_routing.training.fit import fit

    small = {**LESS_TEXT, "forecaster.rank": 4, "route.steps": 2}

    def quickly(model: str, *arguments: Any, **settings: Any) -> Any:
        return fit(model, *arguments, overrides=small, **settings)

    monkeypatch.setitem(informed_routing.__dict__, "fit", quickly)
    for name in ("out", "pruned"):
        if name != keep:
            shutil.rmtree(desk / name)
    tokens = load_tokenizer("demo:smollm2-135m")("the river", return_tensors="pt", return_token_type_ids=False)
    code = code.replace("HuggingFaceTB/SmolLM2-135M", "demo:smollm2-135m")
    exec(compile(code, "document", "exec"), {"tokens": tokens})
