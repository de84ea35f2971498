"""No option of `generate`, `evaluate` and `benchmark` is ignored: what would do nothing is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Outcome

from informed_routing import assets

Run = Callable[..., Outcome]
PROMPT = ["--prompt", "the river", "-n", 3]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails: what is refused is refused before."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(assets, "load_model", load)


@pytest.mark.parametrize(
    "option",
    [
        ["--execution", "native"],
        ["--execution", "sparse"],
        ["--weights", "int8"],
        ["--policy", "exact"],
        ["--budget", "macs"],
        ["--base", "elsewhere"],
        ["--hold"],
        ["--sparsity", "0.25"],
    ],
)
@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.usefixtures("unloaded")
def test_options_of_routed_models_on_a_dense_one(
    run: Run, tiny_folder: Path, text_file: Path, command: str, option: list[str]
) -> None:
    rest = PROMPT if command == "generate" else ["--data", text_file]
    error = run(command, tiny_folder, *rest, *option, "-q").one_line_error()
    assert "dense model" in error
    assert option[0].removeprefix("--") in error
    assert option[-1].removeprefix("--") in error


@pytest.mark.parametrize("option", [["--kv", "drop"], ["--show-routing"]])
@pytest.mark.usefixtures("unloaded")
def test_more_options_of_generate_on_a_dense_model(run: Run, tiny_folder: Path, option: list[str]) -> None:
    assert f"{' '.join(option)} has no effect" in run("generate", tiny_folder, *PROMPT, *option).one_line_error()


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("generate", ["--temperature", 0, "--top-p", 0.9], "--top-p 0.9"),
        ("generate", ["--temperature", "nan"], "--temperature nan"),
        ("generate", ["--temperature", "inf"], "--temperature inf"),
        ("generate", ["--temperature", 1e-9], "--temperature 1e-09"),
        ("generate", ["--top-p", "nan"], "--top-p nan"),
        ("generate", ["--sparsity", "nan"], "--sparsity nan"),
        ("generate", ["--sparsity", 0, "--kv", "drop"], "--kv drop"),
        ("generate", ["--sparsity", 0, "--policy", "auto"], "--policy auto"),
        ("generate", ["--sparsity", 0, "--hold"], "--hold"),
        ("generate", ["--kv", "drop", "--hold"], "--hold"),
        ("generate", ["--policy", "auto", "--hold"], "--policy auto"),
        ("evaluate", ["--execution", "native", "--policy", "auto", "--hold"], "--policy auto"),
        ("generate", ["--sparsity", 0, "--budget", "macs"], "--budget macs"),
        ("generate", ["--budget", "macs"], "--budget macs needs --sparsity"),
        ("generate", ["--kv", "drop", "--execution", "native"], "kv='drop'"),
        ("generate", ["--kv", "drop", "--weights", "int8"], "--weights int8"),
        ("generate", ["--kv", "drop", "--policy", "auto"], "--policy auto"),
        ("generate", ["--execution", "masked", "--weights", "int8"], "--weights int8"),
        ("generate", ["--execution", "masked", "--policy", "auto"], "--policy auto"),
        ("evaluate", ["--execution", "sparse", "--weights", "int8"], "--weights int8"),
        ("evaluate", ["--execution", "masked", "--weights", "int8"], "--weights int8"),
        ("evaluate", ["--sparsity", 0, "--hold"], "--hold"),
        ("evaluate", ["--execution", "native", "--policy", "auto", "--sparsity", 0], "--policy auto"),
        ("evaluate", ["--sparsity", 0, "--budget", "units"], "--budget units"),
        ("evaluate", ["--budget", "macs"], "--budget macs needs --sparsity"),
        ("evaluate", ["--spread", "--limit", 3], "--spread"),
        ("benchmark", ["--engine", "torch", "--weights", "int8"], "--weights int8"),
        ("benchmark", ["--engine", "torch", "--profile"], "--profile"),
        ("benchmark", ["--engine", "transformers", "--sparsity", 0.25], "--sparsity 0.25"),
        ("benchmark", ["--engine", "transformers", "--budget", "macs"], "--budget macs"),
        ("benchmark", ["--engine", "transformers", "--kv", "drop"], "--kv drop"),
        ("benchmark", ["--sparsity", 0, "--kv", "drop"], "--kv drop"),
        ("benchmark", ["--sparsity", 0, "--hold"], "--hold"),
        ("benchmark", ["--kv", "drop", "--hold"], "--hold"),
        ("benchmark", ["--policy", "auto", "--hold"], "--policy auto"),
        ("benchmark", ["--engine", "transformers", "--hold"], "--hold"),
        ("benchmark", ["--sparsity", 0, "--budget", "macs"], "--budget macs"),
        ("benchmark", ["--kv", "drop", "--profile"], "--profile"),
        ("benchmark", ["--kv", "drop", "--weights", "int8"], "--weights int8"),
        ("benchmark", ["--kv", "drop", "--engine", "native"], "kv='drop'"),
    ],
)
def test_combinations_that_do_nothing(
    run: Run, routing_folder: Path, text_file: Path, command: str, options: list[object], named: str
) -> None:
    rest: list[object] = PROMPT if command == "generate" else ["--data", text_file]
    if command == "evaluate":
        rest += ["--split", "all", "--sequence-length", 32, "--limit", 2]
    assert named in run(command, routing_folder, *rest, *options, "-q").one_line_error()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--split", "all"], "--split all"),
        (["--sequence-length", 64], "--sequence-length 64"),
        (["--execution", "native", "--policy", "auto"], "--policy auto"),
    ],
)
def test_options_that_tasks_do_not_have(run: Run, routing_folder: Path, options: list[object], named: str) -> None:
    pytest.importorskip("lm_eval")
    error = run("evaluate", routing_folder, "--tasks", "boolq", *options, "-q").one_line_error()
    assert f"{named} has no effect" in error


@pytest.mark.parametrize("command", ["generate", "evaluate", "benchmark", "whatif"])
@pytest.mark.usefixtures("unloaded")
def test_a_share_that_is_not_calibrated_is_refused_before_the_model_is_loaded(
    run: Run, routing_folder: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    shares: list[object] = ["--sparsity", 0.9]
    if command in ("evaluate", "benchmark"):
        shares = ["--sparsity", 0, "--sparsity", 0.25, *shares]
    clip(routing_folder, "units", 0.5)
    rest: dict[str, list[object]] = {"generate": list(PROMPT), "evaluate": [], "benchmark": []}
    place: list[object] = [command]
    if command == "whatif":
        workload = tmp_path / "nominal.yaml"
        workload.write_text("name: n\ndomains: {wiki: {weight: 1, prompt_tokens: 4, output_tokens: 1}}\n")
        place, rest["whatif"] = ["whatif", "measure"], ["--workload", workload, "--out", tmp_path / "t.parquet"]
    error = run(*place, routing_folder, *rest[command], *shares, "-q").one_line_error()
    assert "0.9 is outside the calibrated range 0.000 to " in error
    assert "(units)" in error


def test_the_range_is_that_of_the_budget_asked_for(run: Run, routing_folder: Path) -> None:
    clip(routing_folder, "macs", 0.3)
    error = run("benchmark", routing_folder, "-s", 0.35, "--budget", "macs", "-q").one_line_error()
    assert "0.35 is outside the calibrated range" in error
    assert "(macs)" in error
    assert "latency table" in run("benchmark", routing_folder, "-s", 0.1, "--budget", "latency").one_line_error()


def clip(folder: Path, budget: str, highest: float) -> None:
    """Leave only those rows of a routing folder's table that save no more than `highest`."""
    path = folder / "routing_config.json"
    config = json.loads(path.read_text())
    config["thresholds"] = [row for row in config["thresholds"] if row[budget] <= highest]
    config["sparsity"] = min(config["sparsity"], *(row[config["budget"]] for row in config["thresholds"][-1:]))
    assert config["sparsity"] > 0
    path.write_text(json.dumps(config))
