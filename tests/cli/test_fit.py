"""`fit` from the command line: a routing folder that the other commands take, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import Outcome, save_tokenizer
from tests.tiny import make_tiny

from informed_routing.cli.demo import fit_state
from informed_routing.execution.cpu import build

Run = Callable[..., Outcome]

RECIPE = """
forecaster: {rank: 4, tokens: 512}
router: {kind: linear}
forecast: {sequence_length: 32}
route: {steps: 4, batch_size: 2, sequence_length: 32, checkpoint_every: 1}
lora: {steps: 2, batch_size: 2, sequence_length: 32, rank: 2}
calibration: {tokens: 512, sequence_length: 32, targets: [0.1, 0.2, 0.3, 0.4]}
"""


@pytest.fixture
def flags(tmp_path: Path, text_file: Path) -> list[object]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    return ["--recipe", recipe, "--data", text_file, "--sparsity", 0.25, "--dtype", "float32", "-q"]


def test_fit_then_evaluate_and_generate(run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object]) -> None:
    out = tmp_path / "out"
    outcome = run("fit", tiny_folder, "--out", out, *flags, "--json", tmp_path / "fit.json")
    assert outcome.code == 0, outcome.err
    assert "forecast: " in outcome.out
    assert f"informed-routing evaluate {out}" in outcome.out
    stored = json.loads((out / "fit.json").read_text())
    content = json.loads((tmp_path / "fit.json").read_text())
    assert (content["command"], content["model"]) == ("fit", str(tiny_folder))
    assert (content["dtype"], content["seed"]) == ("float32", 17)
    assert content["result"] == stored
    assert fit_state(out) == (True, False)
    assert not (out / "checkpoints").exists()
    text = ["--data", flags[3], "--sequence-length", 32, "--json", "-", "-q"]
    runs = run("evaluate", out, *text, "-s", 0, "-s", 0.2, "-s", 0.3).json["result"]["runs"]
    shares = [entry["sparsity"]["units"] for entry in runs]
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[1]
    assert run("generate", out, "--prompt", "the river", "-n", 3, "-q").code == 0


def test_slim_from_fit_to_text(run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object]) -> None:
    """All commands run it, on the native engine where there is one."""
    out = tmp_path / "out"
    outcome = run("fit", tiny_folder, "--out", out, *flags, "--fallback", "slim", "--slice", 0.5)
    assert outcome.code == 0, outcome.err
    settings = json.loads((out / "routing_config.json").read_text())["forecaster"]
    assert (settings["fallback"], settings["slice"]) == ("slim", 0.5)
    text = ["--data", flags[3], "--sequence-length", 32, "--json", "-", "-q"]
    runs = run("evaluate", out, *text, "-s", 0, "-s", 0.2).json["result"]["runs"]
    assert runs[0]["sparsity"]["units"] == 0 < runs[1]["sparsity"]["units"]
    prompt = ["generate", out, "--prompt", "the river", "-n", 3, "--dtype", "float32", "-q"]
    by_torch = run(*prompt, "--execution", "sparse", "--json", "-").json["result"]
    if build.compiler() is not None:
        result = run(*prompt, "--json", "-").json["result"]
        assert result["engine"]["name"] == "native float32"
        assert result["samples"] == by_torch["samples"]
    timed = ["--prompt-tokens", 16, "--new-tokens", 2, "--repeats", 1, "-s", 0.2]
    assert run("benchmark", out, *timed, "--data", flags[3], "--json", "-", "-q").code == 0


def test_output_folder_that_exists(run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    error = run("fit", tiny_folder, "--out", out, *flags).one_line_error()
    assert "exists already and holds thesis.txt" in error
    assert "--overwrite" not in error
    run("fit", tiny_folder, "--out", out, *flags, "--overwrite").one_line_error()
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_the_working_directory_is_never_cleared(
    run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "project"
    for name in (".git/HEAD", ".env"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("precious")
    monkeypatch.chdir(home)
    for more in ([], ["--overwrite"], ["--resume"]):
        error = run("fit", tiny_folder, "--out", ".", *flags, *more).one_line_error()
        assert ".env" in error
        assert "--overwrite" not in error
    assert sorted(path.name for path in home.iterdir()) == [".env", ".git"]


def test_resume_and_overwrite_together(run: Run, routing_folder: Path, tiny_folder: Path, flags: list[object]) -> None:
    error = run("fit", tiny_folder, "--out", routing_folder, *flags, "--resume", "--overwrite").one_line_error()
    assert "--resume and --overwrite exclude each other" in error


def test_the_model_itself_is_no_place_to_write(run: Run, routing_folder: Path, flags: list[object]) -> None:
    error = run("fit", routing_folder, "--out", routing_folder, *flags, "--overwrite").one_line_error()
    assert "is the model that is read" in error


def test_output_that_is_a_file(run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object]) -> None:
    (tmp_path / "out").write_text("x")
    assert "is a file" in run("fit", tiny_folder, "--out", tmp_path / "out", *flags).one_line_error()


def test_a_finished_fit_is_not_resumed(run: Run, routing_folder: Path, tiny_folder: Path, flags: list[object]) -> None:
    error = run("fit", tiny_folder, "--out", routing_folder, *flags, "--resume").one_line_error()
    assert "finished" in error


def test_rank_above_the_hidden_size(run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object]) -> None:
    error = run("fit", tiny_folder, "--out", tmp_path / "out", *flags, "--rank", 65).one_line_error()
    assert "rank 65 is above" in error
    assert "64" in error


def test_unknown_family(run: Run, tmp_path: Path, flags: list[object]) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    folder = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=128)).save_pretrained(folder)
    save_tokenizer(folder)
    assert "BloomAttention" in run("fit", folder, "--out", tmp_path / "out", *flags).one_line_error()


def test_missing_model_and_text(run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert "nowhere" in run("fit", tmp_path / "nowhere", "--out", one, *flags).one_line_error()
    options = ["--recipe", flags[1], "--data", tmp_path / "none.jsonl", "-q"]
    assert "none.jsonl" in run("fit", tiny_folder, "--out", two, *options).one_line_error()
    assert not any((out / "routing_config.json").exists() for out in (one, two))


@pytest.mark.parametrize("refused", ["model", "rank", "text"])
def test_a_refused_fit_can_be_corrected_and_run_again(
    run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object], refused: str
) -> None:
    """The correction must not be met by `out exists already`."""
    out, empty = tmp_path / "out", tmp_path / "empty.txt"
    empty.write_text(" ")
    model = tmp_path / "nowhere" if refused == "model" else tiny_folder
    wrong: dict[str, list[object]] = {"model": [], "rank": ["--rank", 65], "text": ["--data", empty]}
    run("fit", model, "--out", out, *flags, *wrong[refused]).one_line_error()
    outcome = run("fit", tiny_folder, "--out", out, *flags)
    assert outcome.code == 0, outcome.err


def test_ctrl_c_then_resume(
    run: Run, tiny_folder: Path, tmp_path: Path, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run("fit", tiny_folder, "--out", whole, *flags).code == 0
    from informed_routing.training import route

    calls = 0
    original: Any = route.RouteObjective.forward

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(route.RouteObjective, "forward", interrupted)
    error = run("fit", tiny_folder, "--out", out, *flags).one_line_error(1)
    assert "--resume" in error
    assert fit_state(out) == (False, True)
    assert "unfinished fit" in run("evaluate", out).one_line_error()
    outcome = run("fit", tiny_folder, "--out", out, *flags, "--resume")
    assert outcome.code == 0, outcome.err
    from safetensors.torch import load_file

    one, two = (load_file(folder / "routing.safetensors") for folder in (whole, out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_demo_runs_end_to_end_and_reuses_a_finished_fit(
    run: Run,
    tiny_folder: Path,
    routing_folder: Path,
    tmp_path: Path,
    flags: list[object],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The demo's own flow on tiny models and text in place of the embedded ones."""
    monkeypatch.setattr("informed_routing.assets.models.embedded_routing", lambda: routing_folder)
    recipe = tmp_path / "demo.yaml"
    recipe.write_text(f"model: {tiny_folder}\ndata: ['{text_file}']\nseed: 5\n" + RECIPE)
    monkeypatch.setattr("informed_routing.recipes.packaged_recipes", lambda: {"demo": recipe})
    monkeypatch.setattr("informed_routing.cli.evaluate.DEFAULT_TEXTS", (str(text_file),))
    monkeypatch.setattr("informed_routing.cli.demo.PROMPT_TEXTS", [str(text_file)])
    monkeypatch.setattr("informed_routing.cli.demo.SEQUENCE", 32)
    monkeypatch.chdir(tmp_path)
    outcome = run("demo", "--json", "result.json", "--repeats", 1, "--rows", 2)
    assert outcome.code == 0, outcome.err
    assert "dense" in outcome.out
    assert "25%" in outcome.out
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["seed"] == 5
    result = content["result"]
    assert {"fit", "runs", "rows", "samples", "embedded", "environment"} == set(result)
    assert {"runs", "rows", "samples"} == set(result["embedded"])
    assert result["embedded"]["runs"][0] == result["runs"][0]
    assert "demo:smollm2-135m-routed" in outcome.out
    assert result["runs"][0]["sparsity"]["target"] == 0
    assert {row["phase"] for row in result["rows"]} == {"prefill", "decode"}
    again = run("demo", "--repeats", 1, "--rows", 2)
    assert again.code == 0, again.err
    assert "already holds a finished fit" in again.err


def test_unusable_weights_are_named(run: Run, tmp_path: Path, flags: list[object]) -> None:
    folder = tmp_path / "nan"
    model = make_tiny("llama", bos_token_id=None)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    save_tokenizer(folder)
    outcome = run("fit", folder, "--out", tmp_path / "out", *flags)
    assert outcome.code in (1, 2)
    outcome.one_line_error(outcome.code)


def test_a_recipe_that_names_no_model_takes_that_of_the_start(
    run: Run, routing_folder: Path, tmp_path: Path, flags: list[object]
) -> None:
    out = tmp_path / "tuned"
    outcome = run("fit", "--start", routing_folder, "--stages", "lora", "--out", out, *flags)
    assert outcome.code == 0, outcome.err
    assert (out / "lora").is_dir()
