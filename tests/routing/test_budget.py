"""Costs and the counting of sparsity."""

from __future__ import annotations

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import random_ids

from informed_routing.config.folder import ThresholdRow
from informed_routing.errors import InputError
from informed_routing.routing.decision import AlwaysExecute, Threshold
from informed_routing.routing.dial import threshold_for
from informed_routing.routing.target import BudgetMeter


def test_costs_of_a_llama_layer() -> None:
    model = make_routed("llama")
    attention, ffn = model.costs[:2]
    d, kv, f = 64, 32, 128
    assert attention.always == 2 * d * kv
    assert attention.execute == 2 * d * d
    assert attention.per_key == 2 * d
    assert (ffn.always, ffn.execute, ffn.per_key) == (0, 3 * d * f, 0)
    assert attention.router == d * 8 + 8 * 2
    assert attention.forecaster == 2 * d * 8


def test_fused_projections_cost_the_same() -> None:
    split, fused = make_routed("llama").costs, make_routed("phi3").costs
    assert [(c.always, c.execute, c.per_key) for c in split] == [(c.always, c.execute, c.per_key) for c in fused]


def test_window_limits_the_keys() -> None:
    cost = make_routed("mistral").costs[0]
    assert cost.window == 8
    assert cost.dense(100) == cost.always + cost.execute + 8 * cost.per_key


def test_stats_count_macs_by_hand() -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    with torch.no_grad():
        model(random_ids(1, 11))
    gates = [model.routing_state.forward.gates[i][0] for i in range(len(model.units))]
    places = torch.arange(1, 12)
    dense = routed = 0.0
    for cost, gate in zip(model.costs, gates, strict=True):
        dense += 11 * (cost.always + cost.execute) + cost.per_key * int(places.sum())
        routed += 11 * cost.always + int(gate.sum()) * cost.execute + cost.per_key * int(places[gate].sum())
        routed += 11 * cost.router + int((~gate).sum()) * cost.forecaster
    assert model.stats.macs() == (pytest.approx(dense), pytest.approx(routed))
    assert model.stats.limit_speedup() == pytest.approx(dense / routed)


def test_dense_pays_nothing_for_routing() -> None:
    model = make_routed("llama")
    model.set_decision(AlwaysExecute())
    with torch.no_grad():
        model(random_ids(2, 5))
    assert model.routing_stats()["macs"] == 0.0
    assert model.stats.limit_speedup() == 1.0


def test_decode_counts_the_cached_keys() -> None:
    model = make_routed("llama")
    ids = random_ids(1, 9)
    with torch.no_grad():
        out = model(ids[:, :8], use_cache=True)
        model.reset_routing_stats()
        model(ids[:, 8:], past_key_values=out.past_key_values, use_cache=True)
    assert model.stats.keys[0] == 9
    assert model.stats.tokens == 1


def test_units_meter_is_the_paper_share_and_macs_meter_charges_routers() -> None:
    model = make_routed("llama")
    kinds = [u.kind for u in model.units]
    shares = torch.linspace(0, 1, len(kinds))
    units = BudgetMeter(model.costs, kinds, "units", 8)
    assert float(units.saved(shares)) == pytest.approx(float(shares.mean()))
    macs = BudgetMeter(model.costs, kinds, "macs", 8)
    assert float(macs.saved(torch.zeros(len(kinds)))) < 0
    assert macs.attainable() < 1.0


def test_balanced_deviation_holds_both_kinds() -> None:
    model = make_routed("llama")
    meter = BudgetMeter(model.costs, [u.kind for u in model.units], "units", 8)
    shares = torch.tensor([0.5, 0.0] * 3)
    assert float(meter.deviation(shares, 0.25, balanced=False)) == pytest.approx(0.0)
    assert float(meter.deviation(shares, 0.25, balanced=True)) == pytest.approx(0.5)


def test_thresholds_interpolate_and_refuse_what_lies_outside() -> None:
    model = make_routed("llama")
    rows = tuple(
        ThresholdRow(threshold=t, units=u, attention=u, ffn=u, macs=u / 2)
        for t, u in ((-9.0, 0.0), (0.0, 0.2), (1.0, 0.4))
    )
    model.with_thresholds(rows, "units", 0.2, 512)
    config = model.routing_config
    assert threshold_for(config, 0.3) == pytest.approx(0.5)
    assert threshold_for(config, 0.15, "macs") == pytest.approx(0.5)
    with pytest.raises(InputError, match="outside the calibrated range"):
        model.set_sparsity(0.6)
    with pytest.raises(InputError, match=r"1\.5 is not between 0 and 1"):
        model.set_sparsity(1.5)
    model.set_sparsity(0.0)
    assert model.routing_state.dense


def test_uncalibrated_model_says_so() -> None:
    with pytest.raises(InputError, match="not been calibrated"):
        make_routed("llama").set_sparsity(0.2)
