"""The measured table of a latency budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import make_tiny, random_ids

from informed_routing.config.folder import LatencyGains
from informed_routing.config.parts import ForecasterConfig, RouterConfig, SelectionConfig
from informed_routing.errors import InputError
from informed_routing.evaluation import latency
from informed_routing.evaluation.timing import Timing
from informed_routing.execution.choose import EngineChoice
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold
from informed_routing.routing.target import BudgetMeter
from informed_routing.training.calibrate import saved_always

GAINS = LatencyGains(attention=0.2, ffn=0.5, overhead=0.02, seconds=1.0, tokens=8, engine="torch", cpu="x")


SECONDS = {"dense": 10.0, "execute": 10.5, "attention": 8.5, "ffn": 5.5}
Seen = dict[str, tuple[float, float]]


def _measured(model: Any, monkeypatch: pytest.MonkeyPatch, obstacle: str | None = None) -> tuple[LatencyGains, Seen]:
    """The table where the patterns take SECONDS, and the shares that each of them approximated."""
    seen: Seen = {}

    def fake(work: Any, *_: Any) -> dict[str, Timing]:
        for name, run in work.items():
            model.reset_routing_stats()
            run()
            stats = model.routing_stats()
            seen[name] = (stats["attention"], stats["ffn"])
        return {name: Timing(value, value, value, 1) for name, value in SECONDS.items()}

    monkeypatch.setattr(latency, "measure", fake)
    return latency.measure_latency(model, random_ids(1, 20), choice=EngineChoice("float32", obstacle)), seen


@pytest.mark.parametrize("obstacle", [None, "torch is asked for"])
def test_each_pattern_approximates_a_part_of_what_it_names(
    obstacle: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.3))
    gains, seen = _measured(model, monkeypatch, obstacle)
    assert seen == {"dense": (0, 0), "execute": (0, 0), "attention": (0.4, 0), "ffn": (0, 0.4)}
    assert gains.engine == ("torch" if obstacle else "native float32")
    assert (gains.attention, gains.ffn, gains.overhead) == pytest.approx((0.2 / 0.4, 0.5 / 0.4, 0.05))
    assert model.routing_state.decision == Threshold(0.3)
    assert model.routing_state.execution == "sparse"


@pytest.mark.parametrize("obstacle", [None, "torch is asked for"])
def test_static_layers_are_measured_as_what_is_always_saved(
    obstacle: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RoutedModelForCausalLM.attach(
        make_tiny("llama", num_hidden_layers=4),
        ForecasterConfig(rank=8),
        RouterConfig(kind="linear"),
        selection=SelectionConfig(static_layers=(2,)),
    )
    gains, seen = _measured(model, monkeypatch, obstacle)
    assert seen["execute"] == (0.25, 0.25)
    assert seen["attention"] == pytest.approx((0.25 + 0.75 * 0.4, 0.25))
    for name, shares in seen.items():
        if name != "dense":  # what was timed is what the table says
            assert gains.saved(*shares) == pytest.approx(1 - SECONDS[name] / SECONDS["dense"])
    meter = BudgetMeter(model.costs, [unit.kind for unit in model.units], "latency", 10, gains)
    assert saved_always(model, meter) == pytest.approx(1 - SECONDS["execute"] / SECONDS["dense"])


def test_parts_are_others_in_each_unit_and_of_equal_size() -> None:
    gates = latency._part(torch.ones(6, 2, 10, dtype=torch.bool))
    assert (~gates).flatten(1).sum(1).tolist() == [8] * 6
    assert len({tuple(gate.flatten().tolist()) for gate in gates}) == 6


def test_the_meter_counts_measured_time() -> None:
    model = make_routed("llama")
    kinds = [unit.kind for unit in model.units]
    meter = BudgetMeter(model.costs, kinds, "latency", 10, GAINS)
    assert meter.attainable() == pytest.approx(0.2 + 0.5 - 0.02)
    shares = torch.tensor([0.5 if kind == "ffn" else 0.25 for kind in kinds])
    assert float(meter.saved(shares)) == pytest.approx(GAINS.saved(0.25, 0.5))
    with pytest.raises(InputError, match="measured"):
        BudgetMeter(model.costs, kinds, "latency", 10)
