"""Which engine runs, at which shares, on which part of a text, and that all of its numbers are numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import WORDS, Outcome, save_tokenizer
from tests.cli.test_options import clip
from tests.tiny import make_tiny

from informed_routing.execution.cpu import build

Run = Callable[..., Outcome]
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
SMALL = ["--prompt-tokens", 16, "--new-tokens", 2, "--repeats", 1]


# -- the line that says which engine runs --------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ([], "native float32", "it runs this model on this machine"),
        (["--weights", "int8"], "native int8", "it runs this model"),
        (["--execution", "native"], "native float32", "--execution native"),
        (["--execution", "sparse"], "torch sparse", "--execution sparse"),
        (["--execution", "masked"], "torch masked", "--execution masked"),
        (["--kv", "drop"], "torch sparse", "not native: kv='drop'"),
    ],
)
def test_generate_says_which_engine_runs(
    run: Run, routing_folder: Path, options: list[object], name: str, reason: str
) -> None:
    arguments = ["generate", routing_folder, "--prompt", "the river", "-n", 3, "--dtype", "float32", *options]
    outcome = run(*arguments, "--json", "-")
    assert outcome.code == 0, outcome.err
    engine = outcome.json["result"]["engine"]
    assert engine["name"] == name
    assert reason in engine["reason"]
    assert engine.get("policy") == ("exact" if name.startswith(("native", "torch")) else None)
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("engine: ")]
    assert name in line
    assert reason in line


@needs_compiler
@pytest.mark.parametrize("command", ["generate", "evaluate", "benchmark"])
def test_a_text_is_held_to_the_share(
    run: Run, routing_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from informed_routing.routed_model import RoutedModelForCausalLM

    chosen: list[str | None] = []
    original = RoutedModelForCausalLM.set_sparsity

    def spy(self: Any, sparsity: float, budget: Any = None, decision: str | None = None) -> None:
        original(self, sparsity, budget, decision)
        chosen.append(decision if sparsity else "dense")

    monkeypatch.setattr(RoutedModelForCausalLM, "set_sparsity", spy)
    rest: dict[str, list[object]] = {
        "generate": ["--prompt", "the river", "-n", 3],
        "evaluate": ["--data", text_file, "--split", "all", "--sequence-length", 32, "--execution", "native"],
        "benchmark": ["--data", text_file, *SMALL, "--engine", "native", "--engine", "torch"],
    }
    arguments = [command, routing_folder, *rest[command], "--sparsity", 0.3, "--hold", "--dtype", "float32"]
    outcome = run(*arguments, "--json", "-", "-q")
    assert outcome.code == 0, outcome.err
    assert outcome.json["result"]["engine"]["name"].startswith("native")
    assert outcome.json["result"]["decision"] == "held"
    assert set(chosen[1:]) - {"dense"} == {"held"}  # the first is how a folder is loaded
    if command == "evaluate":
        assert outcome.json["result"]["runs"][0]["sparsity"]["units"] == pytest.approx(0.3, abs=0.04)


def test_a_table_without_shares_of_units_cannot_hold(run: Run, routing_folder: Path) -> None:
    path = routing_folder / "config.json"
    content = json.loads(path.read_text())
    del content["shares_by_unit"]
    path.write_text(json.dumps(content))
    error = run("generate", routing_folder, "--prompt", "the river", "-s", 0.3, "--hold").one_line_error()
    assert "informed-routing calibrate" in error


def test_where_the_native_engine_cannot_run_the_reason_is_said(
    run: Run, routing_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from informed_routing.execution import choose

    monkeypatch.setattr(choose, "native_reason", lambda model, progress=None: "no C++ compiler was found")
    generated = run("generate", routing_folder, "--prompt", "the river", "-n", 2, "--json", "-", "-q")
    assert generated.json["result"]["engine"]["name"] == "torch sparse"
    timed = run("benchmark", routing_folder, *SMALL, "--data", text_file, "-s", 0.25, "--json", "-", "-q")
    assert timed.json["result"]["engine"]["name"] == "torch"
    for outcome in (generated, timed):
        assert "not native: no C++ compiler was found" in outcome.json["result"]["engine"]["reason"]


def test_evaluate_and_dense_models_say_theirs(
    run: Run, routing_folder: Path, tiny_folder: Path, text_file: Path
) -> None:
    text = ["--data", text_file, "--sequence-length", 32, "--limit", 2]
    routed = run("evaluate", routing_folder, *text, "--json", "-").json["result"]["engine"]
    assert routed["name"] == "torch sparse"
    assert "default of evaluate" in routed["reason"]
    dense = run("evaluate", tiny_folder, *text)
    assert "engine: transformers (a dense model routes nothing)" in dense.err
    generated = run("generate", tiny_folder, "--prompt", "the river", "-n", 2, "--json", "-", "-q")
    assert generated.json["result"]["engine"]["name"] == "transformers"


@needs_compiler
def test_the_policy_reaches_the_engine(
    run: Run, routing_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from informed_routing.execution.cpu import engine

    made: list[str] = []
    original = engine.CpuEngine.__init__

    def init(self: Any, model: Any, weights: Any = "float32", threads: Any = None, policy: Any = "auto") -> None:
        made.append(policy)
        original(self, model, weights, threads, policy)

    monkeypatch.setattr(engine.CpuEngine, "__init__", init)
    generate = ["generate", routing_folder, "--prompt", "the river", "-n", 2]
    evaluate = ["evaluate", routing_folder, "--data", text_file, "--sequence-length", 32, "--limit", 1]
    benchmark = ["benchmark", routing_folder, *SMALL, "--data", text_file, "-s", 0.25, "--engine", "native"]
    for command in (generate, [*evaluate, "--execution", "native"], benchmark):
        for options, policy in (([], "exact"), (["--policy", "exact"], "exact"), (["--policy", "auto"], "auto")):
            made.clear()
            outcome = run(*command, *options, "--json", "-", "-q")
            assert outcome.code == 0, outcome.err
            assert set(made) == {policy}
            assert outcome.json["result"]["engine"]["policy"] == policy


@needs_compiler
def test_a_profile_is_refused_where_the_engine_cannot_tell(
    run: Run, routing_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from informed_routing.execution.cpu import engine

    monkeypatch.setattr(engine.CpuEngine, "phases", ())
    arguments = ["benchmark", routing_folder, *SMALL, "--data", text_file, "-s", 0.25, "--profile", "-q"]
    assert "--profile has no effect: the engine of this device" in run(*arguments).one_line_error()


@needs_compiler
def test_greedy_text_is_the_same_in_every_engine_cached_or_not(run: Run, routing_folder: Path) -> None:
    from informed_routing import RoutedModelForCausalLM
    from informed_routing.assets import load_tokenizer

    prompts = ["the river rises", "old town stands with its", "salt"]
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    found = {}
    for execution in ("native", "sparse", "masked"):
        options = ["-n", 10, "-s", 0.4, "--execution", execution, "--dtype", "float32", "--json", "-", "-q"]
        samples = run("generate", routing_folder, *given, *options).json["result"]["samples"]
        found[execution] = [sample["text"] for sample in samples]
        # a prompt alone, which another order of calls must not change
        alone = run("generate", routing_folder, "--prompt", prompts[1], *options).json["result"]["samples"]
        assert alone[0]["text"] == samples[1]["text"]
    assert found["native"] == found["sparse"] == found["masked"]
    model = RoutedModelForCausalLM.from_pretrained(routing_folder, dtype="float32")
    tokenizer = load_tokenizer(model.routing_config.base_model.name)
    model.set_sparsity(0.4)
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    for execution in ("native", "sparse"):
        for cached in (True, False):
            model.set_execution(execution, policy="exact")  # type: ignore[arg-type]
            with torch.inference_mode():
                output = model.generate(**batch, max_new_tokens=10, do_sample=False, use_cache=cached)
            new = output[:, batch["input_ids"].shape[1] :]
            assert tokenizer.batch_decode(new, skip_special_tokens=True) == found["native"]


# -- shares of a benchmark -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("highest", "kept"), [(1.0, [0.25, 0.4]), (0.385, [0.25]), (0.1, [])])
def test_benchmark_takes_calibrated_shares_by_itself(
    run: Run, routing_folder: Path, text_file: Path, highest: float, kept: list[float]
) -> None:
    clip(routing_folder, "units", highest)
    rows = json.loads((routing_folder / "routing_config.json").read_text())["thresholds"]
    last = math.floor(100 * max(row["units"] for row in rows)) / 100
    arguments = ["benchmark", routing_folder, *SMALL, "--data", text_file, "--engine", "torch", "--json", "-"]
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    targets = dict.fromkeys(row["sparsity"]["target"] for row in outcome.json["result"]["rows"])
    assert list(targets) == [0.0, *kept, *([] if len(kept) == 2 else [last])]
    assert "of the units: calibrated up to" in outcome.err


def test_benchmark_names_its_engines(run: Run, routing_folder: Path, text_file: Path) -> None:
    names = ["--engine", "transformers", "--engine", "torch", "--engine", "torch"]
    arguments = [*SMALL, "--data", text_file, "-s", 0.25, *names, "--json", "-"]
    result = run("benchmark", routing_folder, *arguments, "-q").json["result"]
    assert result["engines"] == ["transformers", "torch"]  # each once
    assert result["engine"] == {"name": "torch", "reason": "--engine leaves the native one out", "policy": "exact"}


def test_benchmark_of_a_model_fitted_to_drop_keys_is_not_native(
    run: Run, routing_folder: Path, text_file: Path
) -> None:
    """The engine would leave every forward to torch, and its rows would be torch's under another name."""
    path = routing_folder / "routing_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kv": "drop"}))
    arguments = ["benchmark", routing_folder, *SMALL, "--data", text_file, "-s", 0.25]
    result = run(*arguments, "--json", "-", "-q").json["result"]
    assert result["engines"] == ["torch", "transformers"]
    assert "kv='drop'" in result["engine"]["reason"]
    assert "kv='drop'" in run(*arguments, "--engine", "native", "-q").one_line_error()


# -- the part of a text --------------------------------------------------------------------------------------


def test_evaluate_scores_all_of_a_text_that_no_fit_has_read(run: Run, tiny_folder: Path, text_file: Path) -> None:
    outcome = run("evaluate", tiny_folder, "--data", text_file, "--sequence-length", 64, "--json", "-", "-q")
    task = outcome.json["result"]["runs"][0]["tasks"]["story.jsonl"]
    rows = 60 * 41 // 64
    assert (task["part"], task["documents"], task["tokens"]) == ("all", 60, rows * 63)
    assert outcome.json["result"]["data"]["story.jsonl"]["split"] == "all"


def test_evaluate_scores_the_held_out_part_of_a_text_that_the_fit_has_read(
    run: Run, routing_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from informed_routing.evaluation.parts import text_records

    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": " ".join(WORDS[n:])}) + "\n" for n in range(9)))
    records = text_records([str(text_file)])
    (routing_folder / "fit.json").write_text(json.dumps({"recipe": {"data": [str(text_file)]}, "texts": records}))
    arguments = ["evaluate", routing_folder, "--data", text_file, "--data", other, "--sequence-length", 64]
    outcome = run(*arguments, "--json", "-", "-q")
    assert outcome.code == 0, outcome.err
    tasks = outcome.json["result"]["runs"][0]["tasks"]
    assert (tasks["story.jsonl"]["part"], tasks["story.jsonl"]["documents"]) == ("heldout", 6)
    assert (tasks["other.jsonl"]["part"], tasks["other.jsonl"]["documents"]) == ("all", 9)
    shown = run(*arguments, "-q").out
    assert "story.jsonl: its heldout part (the fit has read the rest), 6 documents, 189 tokens in rows of 64" in shown
    assert "other.jsonl: all of it (the fit has read" in shown


def test_a_limit_counts_the_documents_that_are_scored(run: Run, tiny_folder: Path, text_file: Path) -> None:
    arguments = ["evaluate", tiny_folder, "--data", text_file, "--sequence-length", 64, "--json", "-", "-q"]
    everything, some = (run(*arguments, *limit).json["result"]["runs"][0] for limit in ([], ["--limit", 3]))
    assert some["tasks"]["story.jsonl"]["documents"] == math.ceil(3 * 64 / 41)
    assert some["tasks"]["story.jsonl"]["tokens"] == 3 * 63
    assert everything["tasks"]["story.jsonl"]["documents"] == 60


def test_pages_that_the_fit_has_read(run: Run, routing_folder: Path, tmp_path: Path) -> None:
    from informed_routing.evaluation.parts import text_records

    pages = tmp_path / "own.pages.jsonl"
    pages.write_text("".join(json.dumps({"page": " ".join(WORDS)}) + "\n" for _ in range(20)))
    for data, documents in (([str(pages)], 2), (["demo:wiki"], 20)):
        (routing_folder / "fit.json").write_text(json.dumps({"recipe": {"data": data}, "texts": text_records(data)}))
        found = run("evaluate", routing_folder, "--data", pages, "-s", 0, "--json", "-", "-q")
        assert found.json["result"]["runs"][0]["tasks"]["wikitext"]["documents"] == documents


def test_benchmark_takes_prompts_from_all_of_a_text_that_is_new(run: Run, routing_folder: Path, tmp_path: Path) -> None:
    (routing_folder / "fit.json").write_text(json.dumps({"recipe": {"data": ["demo:wiki"]}}))
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": "the river rises in mountains"}) + "\n")
    outcome = run("benchmark", routing_folder, *SMALL, "--data", few, "-s", 0.25, "--engine", "torch")
    assert outcome.code == 0, outcome.err
    assert "few.jsonl: all of it (the fit has read demo:wiki, not this one)" in outcome.err
    assert "has 5 tokens, the largest prompts need 18: it is repeated" in outcome.err


def test_benchmark_takes_prompts_from_all_texts_in_turn(run: Run, routing_folder: Path, tmp_path: Path) -> None:
    from informed_routing.cli.benchmark import _documents
    from informed_routing.progress import NullProgress

    class Session:
        progress = NullProgress()

    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for file in files:
        file.write_text("".join(json.dumps({"text": f"{file.stem}{n}"}) + "\n" for n in range(30)))
    (routing_folder / "fit.json").write_text(json.dumps({"recipe": {"data": ["demo:wiki"]}}))
    found = _documents(Session(), str(routing_folder), list(map(str, files)))  # type: ignore[arg-type]
    assert found[:4] == ["a0", "b0", "a1", "b1"]
    assert len(found) == 60


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose weights fit float16 and whose products in layer 1 do not."""
    folder = tmp_path_factory.mktemp("overflowing")
    model = make_tiny("llama", bos_token_id=None)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("options", [[], ["--temperature", 0.8], ["--num-beams", 2]])
def test_generate_stops_at_logits_that_are_no_numbers(run: Run, overflowing: Path, options: list[object]) -> None:
    arguments = ["generate", overflowing, "--prompt", "the river rises", "-n", 4, *options, "-q"]
    error = run(*arguments, "--dtype", "float16").one_line_error(1)
    for part in (
        "a logit of new token 1 is not a finite number",
        "float16",
        "layer 1 of 3",
        "--dtype bfloat16 or float32",
    ):
        assert part in error
    assert run(*arguments, "--dtype", "float32").code == 0


def test_evaluate_stops_at_a_loss_that_is_no_number(
    run: Run, overflowing: Path, text_file: Path, pages_file: Path
) -> None:
    for data, name in ((text_file, "story.jsonl"), (pages_file, "wikitext")):
        arguments = ["evaluate", overflowing, "--data", data, "--sequence-length", 32, "--limit", 4, "-q"]
        error = run(*arguments, "--dtype", "float16").one_line_error(1)
        for part in (name, "loss of sequence 1", "float16", "layer 1 of 3", "--dtype bfloat16 or float32"):
            assert part in error
        assert run(*arguments, "--dtype", "float32").code == 0


def test_tasks_stop_at_a_loss_that_is_no_number(run: Run, overflowing: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tests.evaluation.local_tasks import write_tasks

    options = ["--tasks", "boolq", "--data-dir", write_tasks(tmp_path / "data"), "--limit", 2, "-q"]
    error = run("evaluate", overflowing, *options, "--dtype", "float16").one_line_error(1)
    assert "task boolq: the log-likelihood of answer 1" in error
    assert "float16" in error


def test_one_document_has_no_standard_error(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tests.evaluation.local_tasks import write_tasks

    options = ["--tasks", "boolq", "--data-dir", write_tasks(tmp_path / "data"), "--limit", 1, "-q"]
    result = run("evaluate", tiny_folder, *options, "--json", "-").json["result"]
    assert set(result["runs"][0]["average"]) == {"accuracy", "tasks"}
    assert numbers_without_null(result["runs"])
    assert run("evaluate", tiny_folder, *options).code == 0


@pytest.mark.parametrize("engine", ["torch", "transformers"])
def test_benchmark_refuses_to_time_what_is_no_number(
    run: Run, routing_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    from informed_routing.evaluation.engines import Engine

    original = Engine.step

    def step(self: Any, ids: Any, cache: Any) -> Any:
        return original(self, ids, cache) * (math.nan if self.name == engine else 1.0)

    monkeypatch.setattr(Engine, "step", step)
    arguments = ["benchmark", routing_folder, *SMALL, "--data", text_file, "-s", 0.25]
    error = run(*arguments, "--engine", "torch", "--engine", "transformers", "-q").one_line_error(1)
    assert f"{engine}, dense: a logit after a prompt of 16 tokens" in error


def numbers_without_null(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(numbers_without_null, value.values()))
    if isinstance(value, list):
        return all(map(numbers_without_null, value))
    return value is not None


def test_no_result_holds_a_null(run: Run, routing_folder: Path, text_file: Path) -> None:
    text = ["--data", text_file, "--sequence-length", 32, "--limit", 2]
    for command in (
        ["evaluate", routing_folder, *text],
        ["generate", routing_folder, "--prompt", "the river", "-n", 2, "--show-routing"],
        ["benchmark", routing_folder, *SMALL, "--data", text_file, "--engine", "torch"],
    ):
        result = run(*command, "--json", "-", "-q").json["result"]
        result.pop("environment", None)  # a machine may have no accelerator and a copy no commit
        assert numbers_without_null(result)
