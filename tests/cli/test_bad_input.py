"""Bad input: one line that names the value and the remedy, exit code 2 (1 for trouble while working)."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Outcome
from tests.tiny import make_tiny

from informed_routing import cli
from informed_routing.errors import WorkError

Run = Callable[..., Outcome]


@pytest.mark.parametrize("command", ["evaluate", "generate", "benchmark"])
def test_missing_model(run: Run, tmp_path: Path, command: str) -> None:
    prompt = ["--prompt", "the"] if command == "generate" else []
    error = run(command, tmp_path / "nowhere", *prompt).one_line_error()
    assert "nowhere" in error
    assert "does not exist" in error


@pytest.mark.parametrize("command", ["evaluate", "generate", "benchmark"])
@pytest.mark.parametrize("value", ["1.5", "-0.1", "25"])
def test_sparsity_outside_0_to_1(run: Run, tiny_folder: Path, command: str, value: str) -> None:
    prompt = ["--prompt", "the"] if command == "generate" else []
    error = run(command, tiny_folder, "--sparsity", value, *prompt).one_line_error()
    assert value in error
    assert "0.25" in error


@pytest.mark.parametrize(
    ("flag", "value", "stages"),
    [
        ("--rank", "8", "lora"),
        ("--fallback", "zero", "lora"),
        ("--router", "mlp", "route"),
        ("--budget", "macs", "lora"),
        ("--sparsity", "0.3", "calibrate"),
    ],
)
@pytest.mark.parametrize("stages_in", ["flag", "recipe"])
def test_flags_that_a_start_has_decided(
    run: Run, routing_folder: Path, tmp_path: Path, flag: str, value: str, stages: str, stages_in: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: unused\nstart: {routing_folder}\nstages: [{stages}]\n")
    where = ["--recipe", recipe] if stages_in == "recipe" else ["--start", routing_folder, "--stages", stages]
    error = run("fit", *where, flag, value, "--out", tmp_path / "out").one_line_error()
    assert f"{flag} {value} has no effect" in error
    assert not (tmp_path / "out").exists()


def test_sparsity_outside_0_to_1_in_fit(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "1.5" in run("fit", tiny_folder, "--out", out, "--sparsity", "1.5").one_line_error()
    assert not out.exists()


def test_text_file_with_no_text(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    assert "holds no text" in run("evaluate", tiny_folder, "--data", empty).one_line_error()


def test_text_shorter_than_one_row(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the river")
    outcome = run("evaluate", tiny_folder, "--data", short)
    assert outcome.code == 0, outcome.err
    assert "short.txt has 3 tokens, less than one row of 512: it is scored in one row of its own" in outcome.err
    assert "2 tokens in rows of 3" in outcome.out


def test_corrupted_safetensors_of_the_routing_folder(run: Run, routing_folder: Path) -> None:
    (routing_folder / "routing.safetensors").write_bytes(b"\x00" * 100)
    error = run("evaluate", routing_folder).one_line_error()
    assert "routing.safetensors" in error
    assert "damaged" in error


def test_corrupted_safetensors_of_the_model(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    assert "broken" in run("evaluate", broken).one_line_error()


def test_damaged_routing_config(run: Run, routing_folder: Path) -> None:
    (routing_folder / "routing_config.json").write_text("{")
    assert "routing_config.json" in run("evaluate", routing_folder).one_line_error()


def test_wrong_base_model(run: Run, routing_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    make_tiny("llama", seed=1, bos_token_id=None).save_pretrained(other)
    assert "wrong base model" in run("evaluate", routing_folder, "--base", other).one_line_error()


def test_sparsity_of_a_dense_model(run: Run, tiny_folder: Path, text_file: Path) -> None:
    arguments = ("--data", text_file, "--sequence-length", 32, "--sparsity", 0.25, "-q")
    error = run("evaluate", tiny_folder, *arguments).one_line_error()
    assert "dense model" in error
    assert "informed-routing fit" in error


def test_sparsity_outside_the_calibrated_range(run: Run, routing_folder: Path, text_file: Path) -> None:
    config = json.loads((routing_folder / "routing_config.json").read_text())
    config["thresholds"] = [row for row in config["thresholds"] if row["units"] <= 0.5]
    (routing_folder / "routing_config.json").write_text(json.dumps(config))
    arguments = ("--data", text_file, "--sequence-length", 32, "--sparsity", 0.9, "-q")
    assert "calibrated range" in run("evaluate", routing_folder, *arguments).one_line_error()


def test_benchmark_of_a_dense_model(run: Run, tiny_folder: Path) -> None:
    assert "not a routing folder" in run("benchmark", tiny_folder).one_line_error()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["benchmark", "--engine", "warp"], "warp"),
        (["benchmark", "--weights", "int3"], "int3"),
        (["generate", "--prompt", "x", "--execution", "sparse", "--weights", "int8"], "int8"),
        (["generate", "--prompt", "x", "--execution", "native", "--kv", "drop"], "drop"),
    ],
)
def test_engines_that_cannot_be(run: Run, routing_folder: Path, arguments: list[str], named: str) -> None:
    command, *rest = arguments
    assert named in run(command, routing_folder, *rest, "-q").one_line_error()


def test_prompt_that_is_empty(run: Run, tiny_folder: Path) -> None:
    assert "prompt is empty" in run("generate", tiny_folder, "--prompt", " ").one_line_error()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "-1"), ("--top-p", "1.5"), ("--num-beams", "0"), ("--max-new-tokens", "0")],
)
def test_bad_sampling_options(run: Run, tiny_folder: Path, option: str, value: str) -> None:
    error = run("generate", tiny_folder, "--prompt", "the", option, value).one_line_error()
    assert option in error
    assert value in error


def test_json_into_a_missing_folder_is_refused_before_any_work(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    error = run("evaluate", tiny_folder, "--json", tmp_path / "no" / "x.json").one_line_error()
    assert "--json" in error


def test_unknown_device_and_thread_count(run: Run, tiny_folder: Path) -> None:
    assert "gpu9" in run("evaluate", tiny_folder, "--device", "gpu9").one_line_error()
    assert "--threads 0" in run("evaluate", tiny_folder, "--threads", "0").one_line_error()


@pytest.mark.parametrize(
    "arguments",
    [["fti"], ["fit"], ["evaluate"], ["evaluate", "x", "--limit", "many"], ["evaluate", "--nope"]],
)
def test_usage_errors_are_one_line(run: Run, arguments: list[str]) -> None:
    assert "--help" in run(*arguments).one_line_error()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--budget", "euros"], "route.budget"),
        (["--stages", "forecast,fly"], "stages"),
        (["--stages", "route,route"], "stages"),
        (["--router", "oracle"], "router.kind"),
        (["--objective", "fun"], "objective"),
        (["--steps", "0"], "--steps"),
        (["--rank", "0"], "forecaster.rank"),
        (["--fallback", "nothing"], "forecaster.fallback"),
        (["--fallback", "slim", "--slice", "0"], "forecaster.slice"),
        (["--fallback", "slim", "--slice", "1"], "forecaster.slice"),
        (["--slice", "0.25"], "forecaster.slice is for fallback slim"),
        (["--batch-size", "0"], "batch_size"),
        (["--recipe", "no-such-recipe"], "no-such-recipe"),
    ],
)
def test_fit_names_the_bad_setting(run: Run, tmp_path: Path, flags: list[str], named: str) -> None:
    out = tmp_path / "out"
    assert named in run("fit", "demo:smollm2-135m", "--out", out, *flags).one_line_error()
    assert not out.exists()


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "big.bin"), 1, "no disk space left for big.bin"),
        (RuntimeError("No space left on device (os error 28)"), 1, "no disk space left"),
        (WorkError("loss is not finite at step 3", "Lower the rate"), 1, "Lower the rate"),
        (KeyboardInterrupt(), 1, "interrupted; run again with --resume"),
        (ZeroDivisionError("oops\nsecond line"), 1, "ZeroDivisionError: oops. Run again with --debug"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_trouble_while_working(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, code: int, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("informed_routing.cli.fit.build_recipe", fail)
    assert said in run("fit", "demo:smollm2-135m", "--out", tmp_path / "out").one_line_error(code)


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    outcome = run("evaluate", tmp_path / "nowhere", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("error: ")


def test_a_wrapped_disk_full_error_is_recognised() -> None:
    inner = OSError(errno.ENOSPC, "No space left on device")
    outer = RuntimeError("could not save")
    outer.__cause__ = inner
    assert cli.explain(outer, "fit") == (
        "no disk space left. Free some; run again with --resume to continue",
        1,
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tasks", "boolq,boolq@2"], "boolq is given twice"),
        (["--tasks", "arc_easy@lots"], "arc_easy@lots"),
        (["--tasks", "boolq", "--preset", "table7"], "--preset"),
        (["--spread"], "--spread has no effect"),
        (["--tasks", "boolq", "--spread"], "--limit"),
        (["--data-dir", "."], "--data-dir has no effect"),
        (["--resume-dir", "."], "--resume-dir has no effect"),
    ],
)
def test_task_flags_that_cannot_work(run: Run, tiny_folder: Path, flags: list[str], named: str) -> None:
    assert named in run("evaluate", tiny_folder, *flags).one_line_error()


def test_unknown_task_and_missing_files(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    error = run("evaluate", tiny_folder, "--tasks", "boolq", "--data-dir", tmp_path, "-q").one_line_error()
    assert "no validation split of boolq" in error
    assert "tasks/boolq/validation.jsonl" in error


def test_tasks_without_the_harness(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("informed_routing.extras.find_spec", lambda name: None)
    error = run("evaluate", tiny_folder, "--tasks", "boolq", "-q").one_line_error()
    assert "pip install 'informed-routing[eval]'" in error


def test_memory_that_runs_out_is_blamed_on_what_was_being_done(
    run: Run, routing_folder: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    sizes = ("--prompt-tokens", 2**31, "--new-tokens", 0, "--repeats", 1, "--engine", "torch")
    tokens = (routing_folder, "--data", text_file, *sizes, "-q")
    monkeypatch.setattr("informed_routing.evaluation.speed.take_prompts", _allocate)
    error = run("benchmark", *tokens).one_line_error(1)
    assert "out of memory (in prefill, 2147483648-token prompt" in error
    assert "--batch-size" not in error

    def exhausted(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("informed_routing.cli.texts.choose_parts", exhausted)
    error = run("evaluate", routing_folder, "-q").one_line_error(1)
    assert "out of memory while reading the input or loading the model" in error
    assert "--batch-size" not in error


def _allocate(*_: Any) -> Any:
    import torch

    return torch.zeros(2**50)


def test_settings_that_nest_too_deeply_or_hold_other_types(run: Run, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    for text, said in {
        "model: " + "[" * 5000: "nested more than 32 deep",
        "seed: -1": "seed = -1",
        "seed: 4294967296": "seed = 4294967296",
        "seed: !!int abc": "line 1: 'abc' is not an integer",
        "route: {learning_rate: .nan}": "line 1: '.nan' is not a finite number",
        "lora: {alpha: true}": "lora.alpha = True",
        "model: x\nmodel: y": "line 2: the key 'model' is given twice",
        "- a": "is not a mapping",
    }.items():
        recipe.write_text(text)
        assert said in run("fit", "--recipe", recipe, "--out", out).one_line_error()
    assert not out.exists()


def test_a_damaged_report_of_a_finished_fit(run: Run, routing_folder: Path) -> None:
    for text, said in {"[" * 100_000: "nested too deeply", "{": "is damaged"}.items():
        (routing_folder / "fit.json").write_text(text)
        assert said in run("demo", "--out", routing_folder, "-q").one_line_error()
