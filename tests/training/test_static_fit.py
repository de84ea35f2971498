"""Fits with static layers: the search and what it finds, interrupted and not, and what comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.interruption import StopAt
from tests.routed import _randomised
from tests.tiny import make_tiny, random_ids

from informed_routing.config.folder import LatencyGains
from informed_routing.config.parts import ForecasterConfig, RouterConfig
from informed_routing.config.recipe import Recipe, StaticSearch
from informed_routing.errors import InputError
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training import targets
from informed_routing.training.fit import fit
from informed_routing.training.stages import text_read
from informed_routing.training.static import Search


@pytest.fixture
def found(recipe: Recipe) -> Recipe:
    """One of the three layers becomes static, then routers are trained."""
    return recipe.with_overrides(
        {
            "stages": ["static", "forecast", "route"],
            "static.layers": 1,
            "static.tokens": 128,
            "static.fit_tokens": 256,
            "static.sequence_length": 32,
            "route.steps": 4,
            "route.sparsity": 0.5,
            "calibration.targets": [0.2, 0.45, 0.5],
        }
    )


def tiny(layers: int = 6, **forecaster: Any) -> RoutedModelForCausalLM:
    model = RoutedModelForCausalLM.attach(
        make_tiny("llama", num_hidden_layers=layers),
        ForecasterConfig(rank=8, **forecaster),
        RouterConfig(kind="linear"),
    )
    return _randomised(model, 3)


def search(model: RoutedModelForCausalLM, layers: int, record: dict[str, Any] | None = None, **settings: Any) -> Search:
    rows = random_ids(8, 24)
    return Search(model, StaticSearch(layers=layers, **settings), rows, random_ids(24, 24, seed=1), record)


@pytest.mark.parametrize("fallback", ["forecaster", "zero", "slim"])
def test_the_layer_that_does_nothing_is_found_first(fallback: str) -> None:
    model = tiny(fallback=fallback)
    with torch.no_grad():
        for part in (model.decoder.layers[3].self_attn.o_proj, model.decoder.layers[3].mlp.down_proj):
            part.weight.zero_()
    units, before = model.units, {name: one.clone() for name, one in model.routing_parameters()}
    seen: list[int] = []
    found = search(model, 2, candidates=2)
    found.run(lambda: seen.append(len(found.layers)))
    assert found.layers[0] == 3
    assert found.divergence[0] < 1e-3 < found.divergence[1]
    assert len(set(found.layers)) == 2
    assert 0 not in found.layers
    assert seen == [1, 2]
    assert found.first_round[0][0] == 3
    assert all(one is other for one, other in zip(units, model.units, strict=True))
    assert all(torch.equal(one, before[name]) for name, one in model.routing_parameters())


def test_an_interrupted_search_goes_on_identically() -> None:
    model, states = tiny(), []
    whole = search(model, 3)
    whole.run(lambda: states.append({key: list(value) for key, value in whole.record.items()}))
    for state in states[:-1]:
        again = search(model, 3, state)
        again.run(lambda: None)
        assert again.record == whole.record


def test_a_fit_finds_static_layers_routes_the_rest_and_its_dial_begins_there(found: Recipe, tmp_path: Path) -> None:
    report = fit(found, tmp_path / "out")["stages"]
    (place,) = report["static"]["layers"]
    model = RoutedModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.routing_config.selection.static_layers == (place,)
    assert place in (1, 2)
    judged = report["forecast"]["quality"]["per_unit"]
    assert [(one["layer"], one["kind"]) for one in judged if one["layer"] == place] == [(place, "ffn")]
    table = model.routing_config.thresholds
    assert min(row.units for row in table) == pytest.approx(1 / 3)
    targets = [row.units for row in table]
    assert any(abs(units - 0.5) < 0.1 for units in targets)
    with pytest.raises(InputError, match="static layers save already"):
        model.set_sparsity(0.2)
    model.set_sparsity(0.45)
    with torch.no_grad():
        model(random_ids(2, 32))
    stats = model.routing_stats()
    assert stats["kv"] == pytest.approx(1 / 3)
    assert 1 / 3 < stats["units"] < 0.7
    names = set(load_file(str(tmp_path / "out" / "routing.safetensors")))
    assert not any(name.startswith((f"layers.{place}.attention", f"layers.{place}.ffn.router")) for name in names)


@pytest.mark.parametrize(
    "stop", [("static layers: 2 of 2 (fit)", 4), ("static layers: 2 of 2", 1), ("forecast", 8), ("calibrate", 1)]
)
def test_a_killed_fit_goes_on_identically(found: Recipe, tmp_path: Path, stop: tuple[str, int]) -> None:
    found = found.with_overrides({"static.layers": 2, "route.sparsity": 0.8, "calibration.targets": [0.8]})
    fit(found, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(found, tmp_path / "killed", progress=StopAt(*stop))
    fit(found, tmp_path / "killed", resume=True)
    one, other = (load_file(str(tmp_path / name / "routing.safetensors")) for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_that_are_named_are_fitted_and_tuned(recipe: Recipe, tmp_path: Path) -> None:
    chosen = recipe.with_overrides(
        {
            "selection.static_layers": [2],
            "route.sparsity": 0.5,
            "calibration.targets": [0.5],
            "route.objective.kind": "distill",
            "route.train_forecasters": True,
        }
    )
    report = fit(chosen, tmp_path / "out")["stages"]
    assert report["forecast"]["closed_form"]["tokens"] == 2 * 1024  # for the original model, then as it is
    model = RoutedModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.routing_config.selection.static_layers == (2,)


def test_layers_that_are_named_go_with_a_budget_of_time(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static layers are a third of the time here, and count towards what is asked for."""
    gains = LatencyGains(attention=0.4, ffn=0.6, overhead=0.0, seconds=1.0, tokens=32, engine="e", cpu="c")
    monkeypatch.setattr(targets, "measure_latency", lambda *_, **__: gains)
    changes = {"selection.static_layers": [2], "route.budget": "latency", "route.sparsity": 0.5}
    chosen = recipe.with_overrides({**changes, "calibration.targets": [0.5]})
    fit(chosen, tmp_path / "out")
    model = RoutedModelForCausalLM.from_pretrained(tmp_path / "out")
    least = 1 / len(model.decoder.layers)
    assert min(row.latency for row in model.routing_config.thresholds) == pytest.approx(least)
    with pytest.raises(InputError, match="static layers"):
        fit(chosen.with_overrides({"route.sparsity": least - 0.05}), tmp_path / "other")


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": ["forecast", "route"]},
        {"static.layers": 0},
        {"selection.static_layers": [1]},
        {"forecaster.activation": "silu", "forecaster.fit": "gradient"},
        {"route.budget": "latency"},
        {"kv": "drop"},
        {"start": "there"},
    ],
)
def test_what_a_search_does_not_go_with_is_refused_by_the_recipe(found: Recipe, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        found.with_overrides(wrong)


@pytest.mark.parametrize(
    ("wrong", "why"), [({"static.layers": 3}, "more than"), ({"route.sparsity": 0.3}, "leaves nothing to routers")]
)
def test_what_the_model_cannot_is_refused_before_any_work(
    found: Recipe, tmp_path: Path, wrong: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        fit(found.with_overrides(wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_without_a_search_are_stored_as_before(recipe: Recipe) -> None:
    assert "static" not in recipe.model_dump()
    assert recipe.with_overrides({"static.tokens": 64}).static.tokens == 64


def test_a_flag_names_the_stage_and_how_many_layers(found: Recipe) -> None:
    from informed_routing.cli.fit import _with_search

    plain = found.with_overrides({"static.layers": 0, "stages": ["forecast", "route"]})
    assert _with_search(plain, 2).stages == ("static", "forecast", "route")
    assert _with_search(plain, 2).static.layers == 2
    assert _with_search(found, 0).stages == ("forecast", "route")
    with pytest.raises(InputError, match="static-layers"):
        _with_search(plain, -1)


def test_the_text_of_the_search_is_counted_once_for_each_layer(found: Recipe) -> None:
    both = found.with_overrides({"static.layers": 2})
    assert text_read(both)["static"] == 2 * 256
    assert text_read(both)["forecast"] == 2 * 1024
    assert text_read(both.with_overrides({"stages": ["forecast", "route"], "static.layers": 0}))["forecast"] == 1024
