"""What commands ask of the engine of a GPU, which the tests run by Triton's interpreter as if the CPU were one."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from tests.routed import make_routed
from tests.tiny import make_tiny, random_ids

from informed_routing.cli import demo
from informed_routing.evaluation import harness, latency
from informed_routing.evaluation.engines import make_engines
from informed_routing.evaluation.speed import benchmark_rows
from informed_routing.evaluation.timing import Timing
from informed_routing.execution import choose
from informed_routing.execution.engine import NativeEngine
from informed_routing.execution.gpu.kind import GpuKind
from informed_routing.progress import NullProgress
from informed_routing.routing.decision import Threshold
from informed_routing.study.decide import engage_native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The GPU engine is the engine of every device; the weights that were asked for, one entry for each engine made."""
    made: list[Any] = []

    class Watched(GpuKind):
        def make(self, model: Any, weights: Any, threads: Any, policy: Any) -> NativeEngine:
            made.append(weights)
            return super().make(model, weights, threads, policy)

    monkeypatch.setattr(choose, "kind_of", lambda device: Watched())
    return made


def small(dtype: torch.dtype = torch.float32) -> Any:
    settings: dict[str, Any] = {"head_dim": 32, "hidden_size": 128} if DEVICE == "cuda" else {}
    model: Any = make_routed("llama", num_hidden_layers=2, **settings)
    return model.to(DEVICE, dtype).eval()


def test_the_table_of_a_latency_budget_is_measured_in_it(packed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    seen: dict[str, tuple[float, float]] = {}

    def run_once(work: Any, *_: Any) -> dict[str, Timing]:
        for name, run in work.items():
            model.reset_routing_stats()
            run()
            stats = model.routing_stats()
            seen[name] = (stats["attention"], stats["ffn"])
        return {name: Timing(1.0, 1.0, 1.0, 1) for name in work}

    monkeypatch.setattr(latency, "measure", run_once)
    gains = latency.measure_latency(model, random_ids(1, 12).to(DEVICE))
    part = pytest.approx(5 / 12)
    assert seen == {"dense": (0, 0), "execute": (0, 0), "attention": (part, 0), "ffn": (0, part)}
    assert gains.engine == "native float32"
    assert len(packed) == 1


def test_a_profile_that_it_cannot_give_ends_no_benchmark() -> None:
    model = small()
    engines = make_engines(None, model, ["native"], ["float32"])
    rows = benchmark_rows(
        engines,
        random_ids(1, 30)[0],
        sparsities=[],
        prompt_tokens=[8],
        new_tokens=[0],
        repeats=1,
        profile=True,
    )
    assert [row["engine"] for row in rows] == ["native float32"]
    assert "phase_seconds" not in rows[0]


FORMATS = [(torch.float32, "bfloat16"), (torch.float16, "float32"), (torch.bfloat16, "float32")]


@pytest.mark.parametrize(("dtype", "precision"), FORMATS)
def test_a_study_takes_the_weights_that_the_model_has(dtype: torch.dtype, precision: Any) -> None:
    model, choice = engage_native(small(dtype), NullProgress(), precision)
    assert choice is not None
    assert choice.native
    assert model.routing_state.native.of(model).weights == str(dtype).removeprefix("torch.")


def test_a_demo_in_float16_times_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    from informed_routing.cli import loading
    from informed_routing.evaluation import speed

    model = small(torch.float16)
    timed: list[list[str]] = []
    run: Any = SimpleNamespace(progress=NullProgress())
    loaded: Any = SimpleNamespace(model=model, tokenizer=None)
    monkeypatch.setattr(loading, "load_base_of", lambda *_: make_tiny("llama").half())
    monkeypatch.setattr(speed, "prompt_text", lambda *_: random_ids(1, 30)[0])

    def note(engines: Any, *_: Any, **__: Any) -> list[Any]:
        timed.append([engine.name for engine in engines])
        return []

    monkeypatch.setattr(speed, "benchmark_rows", note)
    demo._speed(run, loaded, [], 1, "units")
    assert timed[0] == ["native float16", "transformers"]


def test_another_policy_packs_nothing_anew(packed: list[Any]) -> None:
    model = small()
    model.set_execution("native", policy="auto")
    model.set_decision(Threshold(0.0))
    ids, holder = random_ids(2, 12).to(DEVICE), model.routing_state.native
    exact = copy.deepcopy(model)
    exact.set_execution("sparse")
    with torch.inference_mode():
        packed.clear()
        with harness._as_decided(model):
            found = model(input_ids=ids).logits
            torch.testing.assert_close(found, exact(input_ids=ids).logits, rtol=1e-3, atol=2e-3)
        assert packed == []
        assert (holder.policy, holder.of(model).policy) == ("auto", "auto")
        model.reset_routing_stats()
        model(input_ids=ids)
    assert any(unit["rounded_up"] for unit in model.routing_stats()["per_unit"])


def test_losses_are_those_of_the_logits() -> None:
    model = small()
    model.set_execution("native")
    engine: NativeEngine = model.routing_state.native.of(model)
    hidden = torch.randn(5, model.config.hidden_size, device=DEVICE)
    targets = torch.tensor([3, 0, -100, 7, 127], device=DEVICE)
    expected = -engine.head(hidden).log_softmax(-1)[torch.arange(5), targets.clamp(min=0)]
    found = engine.losses(hidden, targets)
    assert found[2] == 0
    scored = targets >= 0
    torch.testing.assert_close(found[scored], expected[scored])


def test_counts_are_read_outside_of_the_mode_that_they_were_made_in() -> None:
    model = small()
    model.set_execution("native")
    model.set_decision(Threshold(0.0))
    ids = random_ids(1, 7).to(DEVICE)
    with torch.inference_mode():
        model.routing_state.native.engine = None  # made anew within
        model.reset_routing_stats()
        model(input_ids=ids)
    assert 0 < model.routing_stats()["units"] < 1
    model.reset_routing_stats()
    with torch.no_grad():
        model(input_ids=ids)
    assert 0 < model.routing_stats()["units"] < 1
