"""The commands on a tiny model: results on stdout, the JSON of `--json`, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Outcome
from tests.evaluation.local_tasks import write_tasks

import informed_routing
from informed_routing.cli.generate import merge_pieces
from informed_routing.cli.loading import is_pages, task_names

Run = Callable[..., Outcome]
ENVELOPE = {
    *("informed_routing", "command", "model", "device", "dtype", "threads"),
    *("torch", "transformers", "seed", "result"),
}
SHARES = {"target", "units", "attention", "ffn", "macs"}


@pytest.fixture
def small(text_file: Path) -> list[object]:
    return ["--data", text_file, "--split", "all", "--sequence-length", 64]


def test_evaluate_dense_as_json(run: Run, tiny_folder: Path, small: list[object], pages_file: Path) -> None:
    outcome = run("evaluate", tiny_folder, *small, "--data", pages_file, "--limit", 4, "--json", "-")
    assert outcome.code == 0, outcome.err
    content = outcome.json
    assert set(content) == ENVELOPE
    assert content["informed_routing"] == informed_routing.__version__
    assert (content["command"], content["model"]) == ("evaluate", str(tiny_folder))
    assert (content["device"], content["seed"]) == ("cpu", 17)
    (only,) = content["result"]["runs"]
    assert only["sparsity"] == {"target": 0.0, "units": 0.0, "attention": 0.0, "ffn": 0.0, "macs": 0.0}
    assert set(only["tasks"]) == {"story.jsonl", "wikitext"}
    assert only["tasks"]["story.jsonl"]["tokens"] == 4 * 63
    assert only["tasks"]["wikitext"]["word_perplexity"] > 1
    assert only["tasks"]["wikitext"]["token_perplexity"] > 1


def test_evaluate_routed_at_several_sparsities(
    run: Run, routing_folder: Path, tiny_folder: Path, small: list[object], tmp_path: Path
) -> None:
    target = tmp_path / "result.json"
    levels = ["--sparsity", 0, "--sparsity", 0.25, "--sparsity", 0.5]
    outcome = run("evaluate", routing_folder, *small, *levels, "--dtype", "float32", "--json", target)
    assert outcome.code == 0, outcome.err
    assert "dense" in outcome.out
    assert "25%" in outcome.out
    runs = json.loads(target.read_text())["result"]["runs"]
    assert [entry["sparsity"]["target"] for entry in runs] == [0, 0.25, 0.5]
    for entry in runs:
        assert set(entry["sparsity"]) == SHARES
        # the table was measured on this very text
        assert entry["sparsity"]["units"] == pytest.approx(entry["sparsity"]["target"], abs=0.03)
    dense = run("evaluate", tiny_folder, *small, "--dtype", "float32", "--json", "-").json["result"]["runs"][0]
    losses = [entry["tasks"]["story.jsonl"]["loss"] for entry in [dense, *runs]]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    assert [path.name for path in tmp_path.glob("*result*")] == ["result.json"]


def test_evaluate_takes_dense_and_trained_sparsity_by_default(
    run: Run, routing_folder: Path, small: list[object]
) -> None:
    runs = run("evaluate", routing_folder, *small, "--json", "-", "-q").json["result"]["runs"]
    assert [entry["sparsity"]["target"] for entry in runs] == [0, 0.25]


def test_progress_goes_to_stderr_and_quiet_silences_it(run: Run, tiny_folder: Path, small: list[object]) -> None:
    loud = run("evaluate", tiny_folder, *small, "--limit", 2)
    assert "perplexity" in loud.err
    quiet = run("evaluate", tiny_folder, *small, "--limit", 2, "-q")
    assert quiet.err == ""
    assert "Perplexity" in quiet.out


def test_evaluation_is_deterministic(run: Run, routing_folder: Path, small: list[object]) -> None:
    def losses() -> list[float]:
        content = run("evaluate", routing_folder, *small, "--json", "-", "-q").json
        return [entry["tasks"]["story.jsonl"]["loss"] for entry in content["result"]["runs"]]

    assert losses() == losses()


def test_generate_text(run: Run, routing_folder: Path) -> None:
    outcome = run("generate", routing_folder, "--prompt", "the river", "-n", 6, "--sparsity", 0.25, "-q")
    assert outcome.code == 0, outcome.err
    assert "the river" in outcome.out
    assert "approximated: " in outcome.out


def test_generate_several_prompts_as_json_with_routing(run: Run, routing_folder: Path) -> None:
    prompts = ["--prompt", "the river rises", "--prompt", "old town"]
    outcome = run("generate", routing_folder, *prompts, "-n", 5, "-s", 0.4, "--show-routing", "--json", "-", "-q")
    assert outcome.code == 0, outcome.err
    samples = outcome.json["result"]["samples"]
    assert [sample["prompt"] for sample in samples] == ["the river rises", "old town"]
    for sample in samples:
        assert set(sample["sparsity"]) == SHARES
        assert 1 <= sample["new_tokens"] <= 5
        assert len(sample["tokens"]) == sample["prompt_tokens"] + sample["new_tokens"]
        assert all(0 <= token["executed"] <= 1 for token in sample["tokens"])
        assert sum(token["generated"] for token in sample["tokens"]) == sample["new_tokens"]


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", 0.7, "--top-p", 0.9],
        ["--num-beams", 2],
        ["--chat"],
        ["--kv", "drop"],
        ["--execution", "masked"],
        ["--sparsity", 0, "--show-routing"],
        ["--show-routing"],
    ],
)
def test_generate_options(run: Run, routing_folder: Path, options: list[object]) -> None:
    outcome = run("generate", routing_folder, "--prompt", "the river", "-n", 4, *options, "-q")
    assert outcome.code == 0, outcome.err


def test_engines_and_formats_generate_and_score(run: Run, routing_folder: Path, small: list[object]) -> None:
    texts = {}
    for options in (["--execution", "masked"], ["--execution", "sparse"], ["--execution", "native"], []):
        arguments = ["generate", routing_folder, "--prompt", "the river", "-n", 12, *options, "--json", "-", "-q"]
        texts[" ".join(map(str, options))] = run(*arguments).json["result"]["samples"][0]["text"]
    assert len(set(texts.values())) == 1, texts
    scores = []
    for weights in ([], ["--weights", "float32"], ["--weights", "int8"]):
        outcome = run("evaluate", routing_folder, *small, "-s", 0, "-s", 0.25, *weights, "--json", "-", "-q")
        assert outcome.code == 0, outcome.err
        runs = outcome.json["result"]["runs"]
        scores.append([next(iter(one["tasks"].values()))["token_perplexity"] for one in runs])
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert scores[2] == pytest.approx(scores[0], rel=0.05)


def test_profile_says_where_the_time_goes(run: Run, routing_folder: Path, text_file: Path) -> None:
    sizes = ["--prompt-tokens", 16, "--new-tokens", 2, "--repeats", 1, "--engine", "native", "--weights", "int8"]
    outcome = run("benchmark", routing_folder, *sizes, "-s", 0.25, "--data", text_file, "--profile", "-q")
    assert outcome.code == 0, outcome.err
    assert "gate_up" in outcome.out
    assert "native int8" in outcome.out


def test_generate_reads_stdin(run: Run, routing_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("small boats"))
    outcome = run("generate", routing_folder, "--prompt", "-", "-n", 2, "--json", "-", "-q")
    assert outcome.json["result"]["samples"][0]["prompt"] == "small boats"


def test_seed_decides_what_is_sampled(run: Run, routing_folder: Path) -> None:
    def sample(seed: int) -> str:
        options = ["--temperature", 1.5, "-n", 24, "--seed", seed, "--json", "-", "-q"]
        outcome = run("generate", routing_folder, "--prompt", "the river", *options)
        text: str = outcome.json["result"]["samples"][0]["text"]
        return text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in (1, 2, 3)}) > 1


def test_benchmark_rows(run: Run, routing_folder: Path, text_file: Path) -> None:
    sizes = ["--prompt-tokens", 16, "--new-tokens", 3, "--batch", 1, "--batch", 2, "--repeats", 2]
    machine = ["--dtype", "float32"]  # some machines have a faster default
    outcome = run("benchmark", routing_folder, *machine, *sizes, "-s", 0.25, "--data", text_file, "--json", "-", "-q")
    assert outcome.code == 0, outcome.err
    result = outcome.json["result"]
    assert {"cpu", "threads", "torch", "transformers", "commit"} <= set(result["environment"])
    rows = result["rows"]
    assert len(rows) == 2 * 2 * 5  # batches, phases; native and torch at 0 and at 0.25, transformers
    fields = {
        *("engine", "phase", "batch", "prompt_tokens", "sparsity", "seconds"),
        *("tokens_per_second", "speedup_vs_dense", "limit_speedup", "fraction_of_limit"),
    }
    for row in rows:
        assert fields <= set(row)
        assert set(row["sparsity"]) == SHARES
        assert row["seconds"]["runs"] == 2
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["fraction_of_limit"] == pytest.approx(row["speedup_vs_dense"] / row["limit_speedup"])
        amount = row["batch"] * (row["new_tokens"] if row["phase"] == "decode" else row["prompt_tokens"])
        assert row["tokens_per_second"] == pytest.approx(amount / row["seconds"]["median"])
    assert {row["engine"] for row in rows} == {"native float32", "torch", "transformers"}
    for group in (rows[i : i + 5] for i in range(0, len(rows), 5)):
        dense = [row for row in group if row["sparsity"]["target"] == 0]
        # the fastest dense engine is the measure
        assert max(row["speedup_vs_dense"] for row in dense) == pytest.approx(1)
        # with so few rows the native engine may find that executing all is faster
        routed = next(row for row in group if row["sparsity"]["target"] and row["engine"] == "torch")
        assert routed["sparsity"]["units"] > 0


def test_numbers_that_are_none_never_become_null(tmp_path: Path) -> None:
    from informed_routing.cli.envelope import write_json
    from informed_routing.errors import WorkError

    said = {"word_perplexity": math.inf, "acc": 0.5, "acc_stderr": math.nan}
    write_json(tmp_path / "x.json", {"result": [said]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"result": [{"word_perplexity": "Infinity", "acc": 0.5}]}
    for bad in (math.nan, math.inf):
        with pytest.raises(WorkError, match=r"result\.runs\[1\]\.loss is (nan|inf)"):
            write_json(tmp_path / "y.json", {"result": {"runs": [{"loss": 1.0}, {"loss": bad}]}})
    assert not (tmp_path / "y.json").exists()


def test_names_of_texts(text_file: Path, pages_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "story.jsonl"
    other.write_text('{"page": "a b"}\n')
    names = task_names(["demo:wiki", str(text_file), str(text_file), str(pages_file), str(other)])
    assert names == ["demo:wiki", "story.jsonl", "story.jsonl#2", "wikitext", "wikitext:story.jsonl"]
    assert is_pages(str(other))
    assert not is_pages(str(text_file))


def test_parts_of_one_character_are_shown_together() -> None:
    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    merged = merge_pieces(Bytes(), list("aé€".encode()), [0.0, 0.2, 0.4, 0.3, 0.6, 0.9])
    assert [(position, text) for position, text, _ in merged] == [(0, "a"), (1, "é"), (3, "€")]
    assert [share for *_, share in merged] == pytest.approx([0.0, 0.3, 0.6])


def test_tokens_are_coloured_on_a_terminal() -> None:
    import io

    from rich.console import Console

    from informed_routing.cli.generate import show_samples

    tokens: list[dict[str, Any]] = [
        {"token": "the", "executed": 0.5, "generated": False},
        {"token": " river", "executed": 1.0, "generated": True},
    ]
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=80)
    show_samples(console, [{"prompt": "the", "text": " river", "tokens": tokens}])
    assert "38;2;70;130;255" in stream.getvalue()  # blue: fewest units
    assert "38;2;255;60;60" in stream.getvalue()  # red: most
    assert "50%" in stream.getvalue()


def test_evaluate_tasks(run: Run, routing_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data_dir = write_tasks(tmp_path / "data")
    options = ["--tasks", "boolq,arc_easy@1,wikitext", "--data-dir", data_dir, "--limit", 3]
    options += ["--resume-dir", tmp_path / "kept", "--dtype", "float32", "-q"]
    outcome = run("evaluate", routing_folder, *options, "--json", "-")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    result = outcome.json["result"]
    assert result["harness"]["documents"] == "first"
    assert (result["harness"]["limit"], result["harness"]["fewshot_seed"]) == (3, 1234)
    dense, routed = result["runs"]
    assert [entry["sparsity"]["target"] for entry in (dense, routed)] == [0, 0.25]
    assert dense["sparsity"]["units"] == 0 < routed["sparsity"]["units"]
    for entry in (dense, routed):
        assert set(entry["tasks"]) == {"boolq", "arc_easy", "wikitext"}
        assert {"acc", "acc_stderr", "shots", "documents", "seconds"} <= set(entry["tasks"]["boolq"])
        assert entry["tasks"]["arc_easy"]["shots"] == 1
        assert entry["tasks"]["wikitext"]["word_perplexity"] > 1
        assert entry["tasks"]["wikitext"]["token_perplexity"] > 1
        mean = (entry["tasks"]["boolq"]["acc"] + entry["tasks"]["arc_easy"]["acc_norm"]) / 2
        assert entry["average"]["accuracy"] == pytest.approx(mean)
        assert set(entry["tasks"]["boolq"]["sparsity"]) == SHARES
    # a second run takes what is there, and prints it for people
    again = run("evaluate", routing_folder, *options)
    assert len(list((tmp_path / "kept").iterdir())) == 6
    for part in ("average of 2", "arc_easy", "acc_norm", "±", "25%", "MACs saved"):
        assert part in again.out
    assert f"{dense['tasks']['wikitext']['word_perplexity']:.2f}" in again.out


def test_evaluate_tasks_beside_texts(run: Run, tiny_folder: Path, small: list[object], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    options = ["--tasks", "boolq", "--data-dir", write_tasks(tmp_path / "data"), "--limit", 2, "--spread", "-q"]
    outcome = run("evaluate", tiny_folder, *small, *options)
    assert outcome.code == 0, outcome.err
    assert "story.jsonl" in outcome.out
    assert "boolq" in outcome.out


def test_evaluate_presets_take_the_papers_tasks(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data_dir = write_tasks(tmp_path / "data")
    options = ["--preset", "table7-small", "--data-dir", data_dir, "--limit", 2, "--json", "-", "-q"]
    (only,) = run("evaluate", tiny_folder, *options).json["result"]["runs"]
    assert only["tasks"]["hellaswag"]["shots"] == 5
    assert len(only["average"]["tasks"]) == 7
