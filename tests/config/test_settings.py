"""Settings take finite numbers of a sane size, and nothing that only looks like one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from informed_routing.config.folder import RoutingConfig
from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError, WorkError
from informed_routing.finite import json_values


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"route": {"learning_rate": math.inf}}, "route.learning_rate = inf"),
        ({"router": {"execute_bias": math.nan}}, "router.execute_bias = nan"),
        ({"router": {"execute_bias": "1e999"}}, "router.execute_bias"),
        ({"router": {"execute_bias": 1e300}}, "router.execute_bias = 1e+300: this number is too large"),
        ({"lora": {"alpha": math.nan}}, "lora.alpha = nan"),
        ({"lora": {"alpha": True}}, "lora.alpha = True: true and false are not taken"),
        ({"forecaster": {"rank": True}}, "forecaster.rank = True"),
        ({"forecaster": {"rank": 10**18}}, "forecaster.rank = 1000000000000000000"),
        ({"calibration": {"targets": [0.1, True]}}, "calibration.targets"),
        ({"calibration": {"targets": []}}, "calibration.targets"),
        ({"calibration": {"targets": [math.nan]}}, "calibration.targets"),
        ({"route": {"steps": 10**30}}, "route.steps"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"data": []}, "data"),
        ({"data": [""]}, "data.0"),
        ({"model": "a\x1bb"}, "model"),
        ({"model": {"a": "x" * 10_000}}, "model"),
    ],
)
def test_numbers_and_names_that_are_none(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_mapping(settings)
    assert str(caught.value).startswith(named)
    assert len(str(caught.value)) < 300


def test_overrides_name_what_is_unknown_and_can_be_none() -> None:
    recipe = Recipe.from_mapping({"router": {"width": 512, "kind": "mlp"}})
    for key in ("router.widht", "nope.x", "model.x", "router.width.x"):
        with pytest.raises(InputError, match=f"unknown setting {key}"):
            recipe.with_overrides({key: 1})
    assert recipe.with_overrides({"router.width": None}).router.width == 512
    assert recipe.with_overrides({"router.width": None}, none_counts=True).router.width is None


def test_a_stored_threshold_that_is_no_number_is_refused() -> None:
    text = RoutingConfig.model_validate(
        {
            "base_model": {"name": "m", "fingerprint": "f", "model_type": "llama"},
            "num_layers": 1,
            "hidden_size": 8,
            "forecaster": {},
            "router": {},
            "thresholds": [{"threshold": 0.5, "units": 0.1, "attention": 0.1, "ffn": 0.1, "macs": 0.1}],
        }
    ).model_dump_json()
    assert RoutingConfig.from_json(text, "x").thresholds[0].threshold == 0.5
    for bad in ("NaN", "Infinity"):
        with pytest.raises(InputError, match=r"x is damaged: .*threshold is"):
            RoutingConfig.from_json(text.replace('"threshold":0.5', f'"threshold":{bad}'), "x")


def test_results_name_the_place_of_a_number_that_is_none() -> None:
    good = {"a": (1, 2.5), 3: None, "word_perplexity": math.inf, "standard_error": math.nan}
    assert json_values(good, "result") == {"a": [1, 2.5], "3": None, "word_perplexity": "Infinity"}
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(WorkError, match=r"result\.rows\[1\]\.loss is"):
            json_values({"rows": [{"loss": 1.0}, {"loss": bad}]}, "result")
    with pytest.raises(WorkError, match="perplexity is nan"):
        json_values({"token_perplexity": math.nan}, "result")
