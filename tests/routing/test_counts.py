"""One definition of what was executed: by hand, on a device, in C++ and in Triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.routed import left_padded, make_routed
from tests.tiny import random_ids

from informed_routing.execution.cpu import build
from informed_routing.execution.gpu.counts import DeviceCounts
from informed_routing.routing.costs import UnitCost
from informed_routing.routing.counts import ALL, NONE, ROUNDED_UP, SOME, count, windows_of
from informed_routing.routing.decision import Threshold
from informed_routing.routing.stats import RoutingStats

COST = UnitCost(0, 1, 1, 0, 0)


@st.composite
def forwards(draw: st.DrawFn) -> tuple[list[list[bool]], list[int], list[int | None], list[bool]]:
    """(gates, contexts, windows, rounded up) of a forward."""
    units, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    gates = draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=units, max_size=units))
    contexts = draw(st.lists(st.integers(0, 20), min_size=tokens, max_size=tokens))
    windows = draw(st.lists(st.sampled_from([None, 1, 3, 8]), min_size=units, max_size=units))
    return gates, contexts, windows, draw(st.lists(st.booleans(), min_size=units, max_size=units))


@settings(max_examples=200, deadline=None)
@given(forwards())
def test_the_definition_is_what_one_would_count_by_hand(forward: Any) -> None:
    gates, contexts, windows, rounded = forward
    costs = [replace(COST, window=window) for window in windows]
    found = count(torch.tensor(gates), torch.tensor(contexts), windows_of(costs), torch.tensor(rounded))
    real = [place for place, keys in enumerate(contexts) if keys]
    for unit, row in enumerate(gates):
        chosen = [place for place in real if row[place]]
        assert int(found.executed[unit]) == len(chosen)
        assert int(found.keys[unit]) == sum(min(contexts[place], windows[unit] or 99) for place in chosen)
        outcome = ALL if len(chosen) == len(real) else SOME if chosen else NONE
        assert int(found.calls[unit].argmax()) == (ROUNDED_UP if rounded[unit] else outcome)
        assert int(found.calls[unit].sum()) == 1


def test_counts_on_a_device_add_up_to_the_same() -> None:
    costs = [COST, replace(COST, window=3)]
    counts, stats = DeviceCounts(costs, torch.device("cpu")), RoutingStats.empty(costs, ["attention", "ffn"])
    counts.belong_to(stats)
    wanted = torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        gates = torch.rand(2, 7, generator=torch.Generator().manual_seed(seed)) < 0.5
        contexts = torch.arange(7) + seed
        counts.add(gates, contexts, torch.zeros(2, dtype=torch.bool))
        wanted += count(gates, contexts, windows_of(costs)).keys
    stats.settle()
    assert torch.equal(stats.executed_keys, wanted)


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("family", ["llama", "mistral"])  # the second has sliding windows
@pytest.mark.parametrize("pads", [None, (0, 4)])
@pytest.mark.parametrize("threshold", [0.0, -1e9, 1e9])
def test_the_cpu_engine_counts_the_same(family: str, pads: tuple[int, ...] | None, threshold: float) -> None:
    model = make_routed(family)
    ids = random_ids(2, 13)
    mask = None if pads is None else left_padded(ids, pads)
    found = {}
    for execution in ("sparse", "native"):
        model.set_execution(execution)  # type: ignore[arg-type]
        model.set_decision(Threshold(threshold))
        with torch.no_grad():
            cache = model(ids[:, :9], attention_mask=None if mask is None else mask[:, :9]).past_key_values
            model(ids[:, 9:], attention_mask=mask, past_key_values=cache)
        stats = model.stats
        found[execution] = (stats.tokens, stats.keys, stats.executed, stats.executed_keys, stats.calls)
    share = float(found["sparse"][2].sum()) / (found["sparse"][0] * len(model.units))
    assert 0 < share < 1 if threshold == 0 else share == (threshold < 0)
    for one, other in zip(found["sparse"], found["native"], strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=0)


def test_counts_that_begin_in_inference_mode_go_on_without_it() -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    with torch.inference_mode():
        model.reset_routing_stats()
        model(random_ids(1, 5))
    with torch.no_grad():
        model(random_ids(1, 5))
    assert model.stats.tokens == 10
