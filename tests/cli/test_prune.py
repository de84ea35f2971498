"""`prune`: static methods from the command line, their folders in the other commands, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Outcome
from transformers import AutoModelForCausalLM

from informed_routing.baselines import static
from informed_routing.files.folders import only_writer

Run = Callable[..., Outcome]


@pytest.fixture
def small(text_file: Path) -> list[object]:
    return ["--data", text_file, "--tokens", 512, "--sequence-length", 64, "--dtype", "float32", "-q"]


def test_removed_layers_leave_an_ordinary_model(
    run: Run, tiny_folder: Path, text_file: Path, small: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "pruned"
    outcome = run("prune", tiny_folder, "--method", "shortgpt", "-s", 0.34, "--out", out, *small, "--json", "-")
    assert outcome.code == 0, outcome.err
    report = outcome.json["result"]["pruning"]
    assert len(report["removed"]) == 1
    assert report["saved"]["macs"] == pytest.approx(1 / 3)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2
    assert not (out / "checkpoints").exists()
    scored = run("evaluate", out, "--data", text_file, "--split", "all", "--sequence-length", 64, "-q", "--json", "-")
    assert scored.code == 0, scored.err
    assert scored.json["result"]["runs"][0]["tasks"]["story.jsonl"]["loss"] > 0


def test_settings_recovery_and_what_is_said(run: Run, tiny_folder: Path, small: list[object], tmp_path: Path) -> None:
    out = tmp_path / "sliced"
    more = ["--set", "measure=body", "--set", "round_to=4", "--recovery-steps", 2, "--batch-size", 2]
    outcome = run("prune", tiny_folder, "--method", "slicegpt", "-s", 0.2, "--out", out, *small, *more)
    assert outcome.code == 0, outcome.err
    for said in ("of body", "Saved: ", "Recovered on 256 tokens", "evaluate"):
        assert said in outcome.out
    model, _ = static.load_static(out)
    assert model.prune_report.settings["round_to"] == 4


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]])
def test_an_interrupted_recovery_goes_on(
    run: Run, tiny_folder: Path, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    out, text, content = tmp_path / "dropped", tmp_path / "mine.jsonl", Path(str(small[1])).read_text()
    text.write_text(content)
    small = ["--data", text, *small[2:]]
    command = ["prune", tiny_folder, "--method", "llm-drop-ffn", "-s", 0.17, "--out", out, *small]
    command += ["--recovery-steps", 2]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(static, "save_static", killed)
        outcome = run(*command)
    assert "--resume" in outcome.one_line_error(1)
    assert (out / "checkpoints").is_dir()
    assert "unfinished prune" in run("evaluate", out).one_line_error()
    other = ["llm-drop" if part == "llm-drop-ffn" else part for part in command]
    for again in ([], ["--resume"]):
        assert "other settings (method llm-drop-ffn" in run(*other, *again).one_line_error()
    text.write_text(content.replace("river", "valley"))
    if how != ["--overwrite"]:
        assert "begun with another text" in run(*command, *how).one_line_error()
    text.write_text(content)
    assert run(*command, *how).code == 0
    assert static.is_static_folder(out)
    assert not (out / "checkpoints").exists()


def test_only_a_pruned_model_is_replaced(run: Run, tiny_folder: Path, small: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["prune", tiny_folder, "--method", "shortgpt", "-s", 0.34, "--out", out, *small]
    assert run(*command).code == 0
    assert "--overwrite" in run(*command).one_line_error()
    assert run(*command, "--overwrite").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    command[command.index(out)] = tmp_path / "mine"
    assert "not empty" in run(*command, "--overwrite").one_line_error()
    assert (tmp_path / "mine" / "notes.txt").exists()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_that_dies_while_it_saves(
    run: Run, tiny_folder: Path, small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Nothing half-written evaluates, and the same command, --resume and --overwrite go on."""
    out = tmp_path / "out"
    command = ["prune", tiny_folder, "--method", "shortgpt", "-s", 0.34, "--out", out, *small]
    command += ["--recovery-steps", steps]
    assert run(*command).code == 0
    wanted = (out / "model.safetensors").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for first, again in (([], []), ([], ["--resume"]), ([], ["--overwrite"]), (["--overwrite"], ["--resume"])):
        if not first:
            shutil.rmtree(out)
        with monkeypatch.context() as patched:
            patched.setattr("informed_routing.baselines.writing.write_json", killed)  # all but the last file is there
            run(*command, *first).one_line_error(1)
        assert (out / "config.json").exists() == bool(first)
        assert run(*command, *again).code == 0
        assert (out / "model.safetensors").read_bytes() == wanted
        assert not (out / "checkpoints").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["a file", "below a file", "a long name", "the model"])
def test_a_bad_output_is_found_before_any_work(
    run: Run, tiny_folder: Path, small: list[object], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    places = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "out",
        "a long name": tmp_path / ("n" * 300),
        "the model": tiny_folder,
    }
    monkeypatch.setattr("informed_routing.assets.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    error = run("prune", tiny_folder, "--method", "shortgpt", "-s", 0.34, "--out", places[where], *small)
    assert "--out" in error.one_line_error()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_second_run_into_the_same_folder(run: Run, tiny_folder: Path, small: list[object], tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"):
        outcome = run("prune", tiny_folder, "--method", "shortgpt", "-s", 0.34, "--out", tmp_path / "out", *small)
    assert "another run is writing into" in outcome.one_line_error()
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_origin_are_never_removed(
    run: Run, tiny_folder: Path, small: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["prune", tiny_folder, "--method", "shortgpt", "-s", 0.34, "--out", out, *small]
    assert run(*command).code == 0
    (out / ".git").mkdir()
    error = run(*command, "--overwrite").one_line_error()
    assert ".git" in error
    assert (out / ".git").is_dir()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method", "magnitude"], "magnitude"),
        (["--sparsity", "1.5"], "1.5"),
        (["--set", "keep"], "--set keep"),
        (["--set", "depth=3"], "depth"),
        (["--tokens", "0"], "--tokens 0"),
        (["--recovery-steps", "1", "--batch-size", "0"], "batch_size"),
        (["--resume", "--overwrite"], "--overwrite"),
    ],
)
def test_bad_values_are_named(
    run: Run, tiny_folder: Path, small: list[object], tmp_path: Path, flags: list[str], named: str
) -> None:
    given = ["--method", "shortgpt", "--sparsity", 0.34, "--out", tmp_path / "out", *small, *flags]
    assert named in run("prune", tiny_folder, *given).one_line_error()
    assert not (tmp_path / "out").exists()
