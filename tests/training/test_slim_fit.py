"""Fits with slim fallbacks: closed form and gradient, interrupted and not, and what starts from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.interruption import StopAt

from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.fit import fit

SLIM = {"forecaster.fallback": "slim", "forecaster.slice": 0.25}
GRADIENT = {"forecaster.fit": "gradient", "forecaster.activation": "silu"}


@pytest.fixture
def slim(recipe: Recipe) -> Recipe:
    """Two stages, refits in the sweeps and after stage 2, and a short table."""
    return recipe.with_overrides(
        {**SLIM, "stages": ["forecast", "route"], "route.steps": 4, "calibration.targets": [0.25]}
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "routing.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def choices(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if name.endswith("forecaster.index")}


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, [("choose slices", 1), ("forecast", 1), ("start routers", 1), ("route", 2), ("refit", 1)]),
        ({"route.train_forecasters": True}, [("route", 3)]),
        (GRADIENT, [("choose slices", 1), ("forecast-gradient", 2), ("route", 2)]),
    ],
    ids=["closed form", "trained", "gradient"],
)
def test_a_resumed_fit_is_the_whole_one(
    slim: Recipe, tmp_path: Path, settings: dict[str, Any], stops: list[tuple[str, int]]
) -> None:
    slim = slim.with_overrides(settings)
    whole, out = tmp_path / "whole", tmp_path / "out"
    fit(slim, whole)
    for place, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            fit(slim, out, resume=bool(place), progress=StopAt(*stop))
    fit(slim, out, resume=True)
    assert same(weights(out), weights(whole))
    found = choices(whole)
    assert len(found) == 3
    assert any(index.tolist() != list(range(32)) for index in found.values())


def test_all_stages_and_what_is_said_of_them(recipe: Recipe, tmp_path: Path) -> None:
    """LoRA too, whose layers lie in the FFNs that slices are of."""
    out = tmp_path / "out"
    report = fit(recipe.with_overrides(SLIM), out)
    stage = report["stages"]["forecast"]
    assert {"share": 0.25, "neurons": 32}.items() <= stage["slice"].items()
    assert -1 < stage["quality"]["explained_variance"]["ffn"] <= 1
    assert "0.25 of each FFN's own neurons" in (out / "README.md").read_text()
    assert json.loads((out / "fit.json").read_text())["recipe"]["forecaster"]["slice"] == 0.25
    model = RoutedModelForCausalLM.from_pretrained(out)
    assert any(row.ffn > 0.05 for row in model.routing_config.thresholds)
    model.set_sparsity(0.25)
    ids = torch.arange(3, 19)[None]
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert text.shape[1] <= 20
    assert model.routing_stats()["tokens"] >= 16


def test_a_fit_that_starts_from_one_keeps_its_choice(slim: Recipe, tmp_path: Path) -> None:
    fit(slim, tmp_path / "first")
    later = {"start": str(tmp_path / "first"), "stages": ["route"], "forecaster.slice": None}
    fit(slim.with_overrides(later), tmp_path / "second")
    first, second = choices(tmp_path / "first"), choices(tmp_path / "second")
    assert same(first, second)
    config = RoutedModelForCausalLM.from_pretrained(tmp_path / "second").routing_config
    assert (config.forecaster.fallback, config.forecaster.slice) == ("slim", 0.25)


def test_a_gradient_fit_comes_close_to_the_closed_form_from_there(slim: Recipe, tmp_path: Path) -> None:
    """The target of the low-rank part is what the slice leaves: started at the optimum, squared error stays there."""
    closed = fit(slim, tmp_path / "closed")["stages"]["forecast"]["quality"]["relative_explained_variance"]["ffn"]
    settings = {"forecaster.fit": "gradient", "forecaster.start": "closed-form", "forecaster.loss": "mse"}
    trained = fit(slim.with_overrides({**settings, "forecast.learning_rate": 1e-5}), tmp_path / "trained")
    found = trained["stages"]["forecast"]["quality"]["relative_explained_variance"]["ffn"]
    assert found == pytest.approx(closed, abs=0.02)


def test_slices_that_cannot_be_are_refused_before_anything_is_written(slim: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is none of an FFN's 128 neurons"):
        fit(slim.with_overrides({"forecaster.slice": 0.05}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_slice_is_another_recipe(slim: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(slim, tmp_path / "out", progress=StopAt("forecast", 1))
    with pytest.raises(InputError, match=r"forecaster\.slice 0\.25, now 0\.5"):
        fit(slim.with_overrides({"forecaster.slice": 0.5}), tmp_path / "out", resume=True)
