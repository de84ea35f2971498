"""Tasks give the numbers of lm-evaluation-harness run directly, from local files, and are computed once."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation.local_tasks import byte_tokenizer, write_rows, write_tasks
from tests.routed import execute, make_routed
from tests.tiny import make_tiny

from informed_routing.errors import InputError
from informed_routing.evaluation.harness_results import ResultFolder, TaskResult
from informed_routing.evaluation.harness_tasks import require_harness
from informed_routing.evaluation.tasks import PRESETS, TaskSpec, subset
from informed_routing.routing.decision import GumbelSample, Threshold

pytest.importorskip("lm_eval")

from informed_routing.evaluation.harness import evaluate_tasks

SIZE: dict[str, Any] = {"vocab_size": 258, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 1}
SMALL = tuple(TaskSpec(spec.name, min(spec.shots or 0, 2)) for spec in PRESETS["table7"])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Attempts to reach the network, which all fail; those that are caught are noted, too."""
    attempts: list[Any] = []

    def refuse(*where: Any, **_: Any) -> None:
        attempts.append(where)
        raise OSError("no network")

    for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(place, name, refuse)
    return attempts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def dense() -> Any:
    return make_tiny("llama", **SIZE)


def routed() -> Any:
    model = make_routed(**SIZE)
    model.set_decision(Threshold(0.1))
    return model


def shares(result: TaskResult) -> dict[str, float]:
    assert result.stats is not None
    return {key: result.stats[key] for key in ("tokens", "units", "attention", "ffn", "macs")}


def directly(model: Any, tokenizer: Any, data_dir: Path, spec: TaskSpec, documents: list[int] | None) -> dict[str, Any]:
    """The harness by itself: its wrapper, its scoring, its definition with another source of documents."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = sorted((data_dir / "tasks" / spec.name).glob("*.jsonl")) or sorted((data_dir / "wikitext2").glob("*"))
    splits = {path.name.split(".")[0]: str(path) for path in files}
    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    if spec.name == "wikitext":
        source |= {"training_split": None, "validation_split": None}
    elif spec.name.startswith(("arc", "openbookqa")):
        source |= {"validation_split": None}
    folder = data_dir / "direct"
    folder.mkdir(exist_ok=True)
    where = {"boolq": "super_glue/boolq/default", "winogrande": "winogrande/default"}
    where |= {name: f"arc/{name}" for name in ("arc_easy", "arc_challenge")}
    definition = (
        Path(str(lm_eval.__file__)).parent / "tasks" / f"{where.get(spec.name, f'{spec.name}/{spec.name}')}.yaml"
    )
    (folder / f"{spec.name}.yaml").write_text(json.dumps({"include": str(definition), "task": spec.name, **source}))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    old = not hasattr(manager, "load")  # before 0.4.12
    task = manager.load_task_or_group([spec.name])[spec.name] if old else manager.load([spec.name])["tasks"][spec.name]
    task.set_config("num_fewshot", spec.shots)
    task.set_fewshot_seed(1234)
    chosen = None if documents is None else {spec.name: documents}
    found = lm_eval.evaluate(lm, {spec.name: task}, samples=chosen, log_samples=False)
    return {key.removesuffix(",none"): value for key, value in found["results"][spec.name].items() if "," in key}


@pytest.mark.parametrize("spec", SMALL, ids=str)
@pytest.mark.parametrize("limit", [None, 3])
def test_numbers_are_those_of_the_harness(data_dir: Path, tokenizer: Any, spec: TaskSpec, limit: int | None) -> None:
    model = dense()
    documents = None if limit is None or spec.name == "wikitext" else list(subset(5, limit, True))
    expected = directly(model, tokenizer, data_dir, spec, documents)
    limit = None if documents is None else limit
    result = evaluate_tasks(model, tokenizer, [spec], data_dir=data_dir, limit=limit, spread=limit is not None)[
        spec.name
    ]
    assert (result.shots, result.stats) == (spec.shots, None)
    assert result.documents == (limit or (3 if spec.name == "wikitext" else 5))
    for name, value in expected.items():
        if value == "N/A":
            continue
        if name.startswith("acc"):
            assert result.metrics[name] == value, name
        else:
            assert result.metrics[name] == pytest.approx(value, rel=1e-5), name
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert ("acc_stderr" in result.metrics) == (spec.name != "wikitext")


def test_the_harness_itself_sees_a_routed_model_as_we_do(data_dir: Path, tokenizer: Any) -> None:
    for spec in (TaskSpec("arc_easy", 2), TaskSpec("wikitext", 0)):
        expected = directly(routed(), tokenizer, data_dir, spec, None)
        result = evaluate_tasks(routed(), tokenizer, [spec], data_dir=data_dir)[spec.name]
        metric = "word_perplexity" if spec.name == "wikitext" else "acc_norm"
        assert result.metrics[metric] == pytest.approx(expected[metric], rel=1e-5)
        assert result.stats is not None
        assert 0.1 < result.stats["units"] < 0.9
        assert {"attention", "ffn", "macs", "tokens"} <= set(result.stats)


def test_local_files_need_no_network(tmp_path: Path, tokenizer: Any, network: list[Any]) -> None:
    fresh = write_tasks(tmp_path)  # nothing of it is in a cache
    evaluate_tasks(dense(), tokenizer, SMALL, data_dir=fresh, limit=1)
    assert not network


def test_two_runs_are_identical_and_batches_do_not_matter(data_dir: Path, tokenizer: Any) -> None:
    def run(batch_size: int) -> dict[str, TaskResult]:
        return evaluate_tasks(routed(), tokenizer, SMALL, data_dir=data_dir, batch_size=batch_size)

    first, second, other = run(4), run(4), run(1)
    assert list(first) == [spec.name for spec in SMALL]
    for name, result in first.items():
        assert result.metrics == second[name].metrics
        assert result.stats == second[name].stats
        assert other[name].metrics == pytest.approx(result.metrics, rel=1e-4)
        assert shares(other[name]) == pytest.approx(shares(result), rel=1e-6)


def test_finished_tasks_are_not_computed_again(
    data_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [TaskSpec("boolq"), TaskSpec("piqa", 1)]
    model = routed()

    def run(**changed: Any) -> dict[str, TaskResult]:
        return evaluate_tasks(model, tokenizer, specs, data_dir=data_dir, results_dir=tmp_path / "kept", **changed)

    first = run(limit=3)
    files = sorted((tmp_path / "kept").iterdir())
    assert [path.name.split("-")[0] for path in files] == ["boolq", "piqa"]
    files[1].unlink()  # as if it had been killed in the second task
    again = run(limit=3, batch_size=2)
    assert again["boolq"] == first["boolq"]  # with its seconds: it is the same run
    assert again["piqa"].metrics == first["piqa"].metrics
    assert sorted((tmp_path / "kept").iterdir()) == files
    files[0].write_text('{"key": ')  # not by us
    assert run(limit=3)["boolq"].metrics == first["boolq"].metrics
    with monkeypatch.context() as broken:
        broken.setattr(type(model), "forward", None)
        assert run(limit=3)["piqa"].metrics == first["piqa"].metrics


def test_everything_that_changes_numbers_makes_another_file(data_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    def names(model: Any, shots: int = 0, **changed: Any) -> set[str]:
        settings = {"data_dir": data_dir, "limit": 2, "results_dir": tmp_path / "kept", **changed}
        evaluate_tasks(model, tokenizer, [TaskSpec("boolq", shots)], **settings)
        return {path.name for path in (tmp_path / "kept").iterdir()}

    model = routed()
    seen = names(model)
    assert names(model, batch_size=1) == seen
    model.set_execution("masked")
    assert names(model) == seen

    def differs(found: set[str]) -> None:
        nonlocal seen
        assert len(found) == len(seen) + 1
        seen = found

    differs(names(model, limit=3))
    differs(names(model, spread=True, limit=3))
    differs(names(model, shots=1))
    model.set_decision(Threshold(0.2))
    differs(names(model))
    with torch.no_grad():
        model.units[-1].router.outer.weight[0, 0] += 1e-3
    differs(names(model))
    differs(names(dense()))
    other = write_tasks(tmp_path / "other", documents=6)
    differs(names(model, data_dir=other))


def test_a_key_that_only_seems_the_same_is_not_taken(tmp_path: Path) -> None:
    folder, result = ResultFolder(tmp_path, {"weights": "a"}), TaskResult("boolq", 0, 3, {"acc": 0.5}, 1.0)
    folder.save({"name": "boolq"}, result)
    assert folder.load({"name": "boolq"}) == result
    other = ResultFolder(tmp_path, {"weights": "b"})
    folder.path({"name": "boolq"}).rename(other.path({"name": "boolq"}))
    assert other.load({"name": "boolq"}) is None


def test_the_model_is_left_as_it_was(data_dir: Path, tokenizer: Any) -> None:
    model = routed().train()
    pad, numbers = tokenizer.pad_token, torch.initial_seed()
    evaluate_tasks(model, tokenizer, [TaskSpec("boolq")], data_dir=data_dir, limit=1)
    assert model.training
    assert (tokenizer.pad_token, torch.initial_seed()) == (pad, numbers)


def test_engines_execute_what_the_routers_ask_and_no_more(data_dir: Path, tokenizer: Any) -> None:
    specs = [TaskSpec("arc_easy", 1)]
    expected = evaluate_tasks(routed(), tokenizer, specs, data_dir=data_dir)["arc_easy"]
    model = routed()
    execute(model, "native", policy="auto")  # it rounds up such small calls
    engine = model.routing_state.native
    found = evaluate_tasks(model, tokenizer, specs, data_dir=data_dir)["arc_easy"]
    assert model.routing_state.native is engine
    assert found.metrics == expected.metrics
    assert shares(found) == pytest.approx(shares(expected))


def test_sampled_decisions_are_refused(data_dir: Path, tokenizer: Any) -> None:
    model = routed()
    model.set_decision(GumbelSample())
    with pytest.raises(InputError, match="set_sparsity"):
        evaluate_tasks(model, tokenizer, [TaskSpec("boolq")], data_dir=data_dir)


def test_what_is_missing_is_named_before_anything_is_computed(
    data_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.nn.Linear(1, 1)  # whatever is computed with it fails

    def fails(spec: str, match: str, folder: Path = data_dir) -> None:
        specs = [TaskSpec("boolq"), TaskSpec.parse(spec)]
        with pytest.raises(InputError, match=match):
            evaluate_tasks(nothing, tokenizer, specs, data_dir=folder)

    fails("arc_esay", "arc_esay is not a task of lm-evaluation-harness .* such as arc_easy")
    fails("mmlu", "groups are not taken.*mmlu_")
    fails("boolq", "nowhere does not exist", tmp_path / "nowhere")
    only = tmp_path / "only"
    for split in ("validation", "train"):
        source = data_dir / "tasks" / "boolq" / f"{split}.jsonl"
        write_rows(only / "boolq" / f"{split}.jsonl", [json.loads(line) for line in source.read_text().splitlines()])
    fails("arc_easy", r"no test split of arc_easy. Put it at .*tasks/arc_easy/test.jsonl", only)
    write_rows(only / "arc_easy" / "test.jsonl", [{"question": "the", "answer": "A"}])
    fails("arc_easy@3", "no train split of arc_easy", only)
    fails("arc_easy", "files of arc_easy do not fit the task", only)
    monkeypatch.setattr("informed_routing.extras.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'informed-routing\[eval\]'"):
        require_harness()
