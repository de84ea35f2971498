"""One place decides which engine runs, and all engines have the same face."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.routed import make_baseline, make_routed
from tests.tiny import random_ids

from informed_routing.execution import choose
from informed_routing.execution.choose import choose_engine, make_engine
from informed_routing.execution.cpu import build
from informed_routing.execution.cpu.kind import CpuKind
from informed_routing.execution.engine import EngineKind, NativeEngine
from informed_routing.execution.gpu.kind import GpuKind
from informed_routing.routing.decision import Threshold

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
KINDS: list[EngineKind] = [CpuKind(), GpuKind()]  # checked by mypy, too


@pytest.mark.parametrize("kind", KINDS, ids=["cpu", "gpu"])
def test_every_engine_has_the_whole_face(kind: EngineKind, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(kind, GpuKind):
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter runs where there is no GPU")
    elif build.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(choose, "kind_of", lambda device: kind)
    model: Any = make_routed("llama", num_hidden_layers=2)
    engine = make_engine(model, None, None, "exact")
    assert isinstance(engine, NativeEngine)
    assert engine.units == 4
    assert engine.is_of(model)
    model.set_execution("native")
    model.set_decision(Threshold(0.0))
    with torch.inference_mode(), model.routing_state.native.of(model).profiled() as phases:
        model(input_ids=random_ids(1, 7))
    assert tuple(phases) == engine.phases
    assert all(seconds >= 0 for seconds in phases.values())


@pytest.mark.parametrize(
    ("kind", "dtype", "factors", "weights"),
    [
        (CpuKind(), torch.float32, "float32", "float32"),
        (CpuKind(), torch.float32, "bfloat16", "bfloat16"),
        (CpuKind(), torch.bfloat16, "float32", "bfloat16"),
        (CpuKind(), torch.float16, "float32", "float32"),
        (GpuKind(), torch.float32, "bfloat16", "float32"),
        (GpuKind(), torch.bfloat16, "float32", "bfloat16"),
        (GpuKind(), torch.float16, "float32", "float16"),
    ],
)
def test_the_format_is_one_that_the_engine_of_the_device_takes(
    kind: EngineKind, dtype: torch.dtype, factors: Any, weights: str
) -> None:
    assert kind.own_format(dtype, factors) == weights


@needs_compiler
def test_the_native_engine_is_chosen_where_it_can_do_all_that_is_asked() -> None:
    model = make_routed("llama")
    choice = choose_engine(model)
    assert (choice.native, choice.weights) == (True, "float32")
    assert choice.reason == "it runs this model on this machine"
    for asked, word in (({"kv": "drop"}, "kv='drop'"), ({"decision": "top-k"}, "top-k")):
        choice = choose_engine(model, **asked)  # type: ignore[arg-type]
        assert not choice.native
        assert word in str(choice.obstacle)
        assert choice.reason == f"not native: {choice.obstacle}"
    model.set_execution("sparse", kv="drop")
    assert not choose_engine(model).native, "the model's own setting counts where none is given"
    assert choose_engine(make_baseline("mod")).obstacle == "ranking routers"


@needs_compiler
def test_another_policy_packs_nothing_anew() -> None:
    model = make_routed("llama")
    model.set_execution("native", policy="auto")
    holder = model.routing_state.native
    engine = holder.of(model)
    with holder.exactly():
        assert holder.of(model) is engine
        assert (holder.policy, engine.policy) == ("exact", "exact")
        with holder.exactly():
            pass
        assert engine.policy == "exact"
    assert (holder.policy, engine.policy) == ("auto", "auto")
