"""Timings: engines take turns, preparation is off the clock, and decode does what generate does."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from tests.tiny import make_tiny, random_ids

from informed_routing.errors import InputError
from informed_routing.evaluation import timing
from informed_routing.evaluation.engines import CompiledEngine, Engine, RoutedEngine, make_engines
from informed_routing.evaluation.environment import check_threads, environment
from informed_routing.evaluation.speed import (
    benchmark_rows,
    decode_callable,
    prefill_callable,
    take_prompts,
)
from informed_routing.evaluation.timing import Workload, measure


def test_measure_takes_turns() -> None:
    calls: list[str] = []
    engines = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = measure(engines, repeats=4, warmup=2)  # type: ignore[arg-type]
    assert len(calls) == 3 * 6
    for turn in range(0, len(calls), 3):  # nobody runs again before everybody has run
        assert set(calls[turn : turn + 3]) == {"a", "b", "c"}
    assert len({tuple(calls[turn : turn + 3]) for turn in range(0, len(calls), 3)}) == 3  # and the order changes
    assert all(timing.runs == 4 for timing in timings.values())


def test_measure_reports_median_and_extremes_without_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    costs = iter([100.0, 5.0, 1.0, 3.0])

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    work = Workload(run=lambda _: wait(next(costs)), prepare=lambda: wait(1000))
    found = measure({"x": work}, repeats=3, warmup=1)["x"]
    assert (found.median, found.min, found.max, found.runs) == (3.0, 1.0, 5.0, 3)


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(InputError):
        measure({})
    with pytest.raises(InputError):
        measure({"x": lambda: None}, repeats=0)


def test_decode_reads_the_given_tokens_and_gives_the_greedy_ones() -> None:
    model, ids = make_tiny("llama", eos_token_id=None), random_ids(2, 9)
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    # fed with what generate made, every step must make the next token of it
    assert torch.equal(decode_callable(Engine(model), ids, expected[:, 9:14])(), expected[:, 10:])


def test_prefill_computes_one_row_of_logits_per_prompt() -> None:
    model, ids = make_tiny("llama"), random_ids(3, 9)
    logits = prefill_callable(Engine(model), ids)()
    assert logits.shape == (3, 1, 128)
    with torch.inference_mode():
        torch.testing.assert_close(logits[:, 0], model(ids).logits[:, -1])


def test_every_engine_does_the_same() -> None:
    from informed_routing import RoutedModelForCausalLM

    routed = RoutedModelForCausalLM.attach(make_tiny("llama"))
    engines = make_engines(make_tiny("llama"), routed, ["native", "torch", "transformers"], ["float32"])
    ids, following = random_ids(2, 9), random_ids(2, 5, seed=1)
    texts = [decode_callable(one, ids, following, functools.partial(one.use, 0.0, None))() for one in engines]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(("names", "weights"), [(["fast"], ["float32"]), (["native"], ["int3"])])
def test_unknown_engines_and_weights_are_refused(names: list[str], weights: list[str]) -> None:
    with pytest.raises(InputError):
        make_engines(None, None, names, weights)


def test_float16_is_called_float16() -> None:
    (engine,) = make_engines(make_tiny("llama").half(), None, ["transformers"], [])
    assert engine.weights == "float16"
    assert engine.storage.body == 2


def test_prompts_are_repeated_when_the_text_is_short() -> None:
    assert take_prompts(torch.arange(5), 2, 4).tolist() == [[0, 1, 2, 3], [4, 0, 1, 2]]


def test_rows_are_measured_at_the_sparsity_they_name() -> None:
    from informed_routing import RoutedModelForCausalLM
    from informed_routing.routing.decision import AlwaysExecute, Given

    routed: Any = RoutedModelForCausalLM.attach(make_tiny("llama"))
    seen: Counter[float] = Counter()

    def set_sparsity(value: float, budget: str | None = None, decision: str | None = None) -> None:
        seen[value] += 1
        routed.set_decision(Given(torch.zeros(1, 1, dtype=torch.bool)) if value else AlwaysExecute())

    routed.set_sparsity = set_sparsity
    rows = benchmark_rows(
        [Engine(make_tiny("llama")), RoutedEngine(routed)],
        random_ids(1, 50)[0],
        sparsities=[0.5],
        prompt_tokens=[12],
        new_tokens=[2],
        repeats=2,
    )
    assert [(row["engine"], row["phase"], row["sparsity"]["target"]) for row in rows] == [
        ("transformers", "prefill", 0.0),
        ("torch", "prefill", 0.0),
        ("torch", "prefill", 0.5),
        ("transformers", "decode", 0.0),
        ("torch", "decode", 0.0),
        ("torch", "decode", 0.5),
    ]
    # a look at its numbers, warm-up, repeats, and one run that counts
    assert seen[0.0] == seen[0.5] == 2 * (1 + 1 + 2 + 1)
    for row in rows:
        full = row["sparsity"]["target"] == 0.5
        assert row["sparsity"]["units"] == (1.0 if full else 0.0)
        assert (row["limit_speedup"] > 1.1) == full
        best = min(r["seconds"]["median"] for r in rows if r["phase"] == row["phase"] and not r["sparsity"]["target"])
        assert row["speedup_vs_dense"] == pytest.approx(best / row["seconds"]["median"])


@pytest.mark.parametrize(
    "settings", [{"prompt_tokens": [0]}, {"new_tokens": [-1]}, {"batches": [0]}, {"text": torch.zeros(0)}]
)
def test_settings_that_cannot_be_measured(settings: dict[str, Any]) -> None:
    text = settings.pop("text", torch.arange(5))
    with pytest.raises(InputError):
        benchmark_rows([], text, **settings)


def test_environment_names_no_machine_and_no_path() -> None:
    import getpass
    import platform
    from pathlib import Path

    found = environment()
    assert found["threads"] == torch.get_num_threads()
    words = " ".join(str(value) for value in found.values())
    assert platform.node() not in words
    assert str(Path.home()) not in words
    assert getpass.getuser() not in words.split()


def test_thread_count_below_one() -> None:
    with pytest.raises(InputError, match="--threads 0"):
        check_threads(0)


def test_the_compiled_engine_leaves_no_settings_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    before = inductor.freezing, torch._dynamo.config.recompile_limit  # type: ignore[attr-defined]
    seen: list[bool] = []

    def compiled(forward: Any, **_: Any) -> Any:
        def run(**inputs: Any) -> Any:
            seen.append(inductor.freezing)
            return forward(**inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    engine, ids = CompiledEngine(make_tiny("llama")), random_ids(1, 5)
    engine.step(ids, engine.fresh_cache(1, 5))
    with engine.fixed():
        engine.step(ids, engine.fresh_cache(1, 5))
    assert seen == [True, True]
    assert (inductor.freezing, torch._dynamo.config.recompile_limit) == before  # type: ignore[attr-defined]
