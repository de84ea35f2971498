"""The roofline: bytes of a decode step, arithmetic of a prefill."""

from __future__ import annotations

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import random_ids

from informed_routing.execution.formats import FORMATS
from informed_routing.routing.decision import Threshold
from informed_routing.routing.limits import Balance, limit_speedup, work_of

MEMORY_BOUND, ARITHMETIC_BOUND = Balance(1.0, 1e30), Balance(1e30, 1.0)


def _step(batch: int = 1) -> tuple[object, list[torch.Tensor]]:
    """A tiny model after one decode step on 7 earlier tokens, and its gates."""
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    ids = random_ids(batch, 8)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
        model.reset_routing_stats()
        model(ids[:, 7:], past_key_values=cache)
    return model, [model.routing_state.forward.gates[i].reshape(-1) for i in range(len(model.units))]


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_a_decode_step_by_hand(batch: int) -> None:
    model, gates = _step(batch)
    storage, head = FORMATS["int4"].storage, 128 * 64
    dense = routed = head * storage.head
    for cost, gate in zip(model.costs, gates, strict=True):  # type: ignore[attr-defined]
        executed = int(gate.sum())
        activations = batch * cost.stream * 4
        dense += (cost.always + cost.execute) * storage.body + batch * 8 * cost.kv * storage.kv + activations
        routed += cost.always * storage.body + cost.router * storage.router + activations
        routed += cost.execute * storage.body * (executed > 0) + executed * 8 * cost.kv * storage.kv
        routed += cost.forecaster * storage.forecaster * (executed < batch)
    stats = model.stats  # type: ignore[attr-defined]
    for flag, expected in ((True, dense), (False, routed)):
        found = work_of(stats, storage, head, batch, decode=True, dense=flag)
        assert found.total_bytes() == pytest.approx(expected)
    found_limit = limit_speedup(stats, storage, MEMORY_BOUND, head, batch, decode=True)
    assert found_limit == pytest.approx(dense / routed)


def test_arithmetic_bound_limit_is_that_of_the_macs() -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    with torch.no_grad():
        model(random_ids(2, 30))
    head = 128 * 64
    expected = model.stats.limit_speedup(2 * head)
    found = limit_speedup(model.stats, FORMATS["float32"].storage, ARITHMETIC_BOUND, head, 2, decode=False)
    assert found == pytest.approx(expected)
    assert found > 1
