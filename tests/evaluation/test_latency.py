"""The measured table of a latency budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import random_ids

from informed_routing.config.folder import LatencyGains
from informed_routing.errors import InputError
from informed_routing.evaluation import latency
from informed_routing.evaluation.timing import Timing
from informed_routing.execution.choose import EngineChoice
from informed_routing.routing.decision import Threshold
from informed_routing.routing.target import BudgetMeter

GAINS = LatencyGains(attention=0.2, ffn=0.5, overhead=0.02, seconds=1.0, tokens=8, engine="torch", cpu="x")


@pytest.mark.parametrize("obstacle", [None, "torch is asked for"])
def test_each_pattern_approximates_what_it_names(obstacle: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.3))
    seen: dict[str, tuple[float, float]] = {}

    def fake(work: Any, *_: Any) -> dict[str, Timing]:
        for name, run in work.items():
            model.reset_routing_stats()
            run()
            stats = model.routing_stats()
            seen[name] = (stats["attention"], stats["ffn"])
        seconds = {"dense": 10.0, "execute": 10.5, "attention": 8.5, "ffn": 5.5}
        return {name: Timing(value, value, value, 1) for name, value in seconds.items()}

    monkeypatch.setattr(latency, "measure", fake)
    gains = latency.measure_latency(model, random_ids(1, 12), choice=EngineChoice("float32", obstacle))
    assert seen == {"dense": (0, 0), "execute": (0, 0), "attention": (1, 0), "ffn": (0, 1)}
    assert gains.engine == ("torch" if obstacle else "native float32")
    assert (gains.attention, gains.ffn, gains.overhead) == pytest.approx((0.2, 0.5, 0.05))
    assert model.routing_state.decision == Threshold(0.3)
    assert model.routing_state.execution == "sparse"


def test_the_meter_counts_measured_time() -> None:
    model = make_routed("llama")
    kinds = [unit.kind for unit in model.units]
    meter = BudgetMeter(model.costs, kinds, "latency", 10, GAINS)
    assert meter.attainable() == pytest.approx(0.2 + 0.5 - 0.02)
    shares = torch.tensor([0.5 if kind == "ffn" else 0.25 for kind in kinds])
    assert float(meter.saved(shares)) == pytest.approx(GAINS.saved(0.25, 0.5))
    with pytest.raises(InputError, match="measured"):
        BudgetMeter(model.costs, kinds, "latency", 10)
