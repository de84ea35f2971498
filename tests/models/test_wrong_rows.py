"""Rows and engines that fit a family by the names of its parts, and compute something else: found by the self-check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_types
import torch
from tests.tiny import make_tiny
from torch import nn

from informed_routing.config.parts import ForecasterConfig
from informed_routing.errors import InputError
from informed_routing.execution import remembered
from informed_routing.execution.cpu import build
from informed_routing.models import discover
from informed_routing.models.families import FAMILIES
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold

WRONG = {
    **{"helium": "qwen3", "olmo": "olmo2", "granite_swa": "llama", "hyperclovax": "llama", "glm4": "llama"},
    **{"ernie4_5": "olmo2", "glm": "granite", "hunyuan_v1_dense": "qwen3", "glm4_moe": "gemma2", "seed_oss": "olmo2"},
    **{"diffllama": "llama", "exaone4": "llama", "phi": "llama", "cohere": "llama", "starcoder2": "qwen3"},
    **{"granitemoe": "mistral", "llama4": "llama", "bitnet": "llama", "apertus": "llama", "nanochat": "llama"},
}
"""A row whose parts a type has by name, or nearly, and which is not its own."""

FACTORS: dict[str, Any] = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156}
"""Of Granite's real models; without any they are Llamas."""

ENGINES = ("ernie4_5", "helium", "granite_swa", "hyperclovax", "glm")
"""Which fit the native engines by the names of their parts, and would be computed wrong."""


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remembered, "cache_dir", lambda: tmp_path)


def _model(name: str) -> Any:
    return make_tiny(name, **FACTORS) if name.startswith("granite") else tiny_types.make(name)


def _as(monkeypatch: pytest.MonkeyPatch, name: str, row: str) -> Any:
    model = _model(name)
    rows = {**FAMILIES, model.config.model_type: replace(FAMILIES[row], native=())}
    monkeypatch.setattr(discover, "FAMILIES", rows)
    return model


@pytest.mark.parametrize(("name", "row"), WRONG.items())
def test_a_row_that_is_not_a_types_own_is_refused(name: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((InputError, AttributeError)):
        RoutedModelForCausalLM.attach(_as(monkeypatch, name, row), ForecasterConfig(rank=8))


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_computes_something_else_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(name)
    row = replace(discover.family_of(model), native=("cpu",))
    monkeypatch.setattr(discover, "FAMILIES", {**FAMILIES, model.config.model_type: row})
    routed = RoutedModelForCausalLM.attach(model, ForecasterConfig(rank=8))
    with pytest.raises(InputError, match=r"the self-check failed|the native engine"):
        routed.set_execution("native")
    assert routed.routing_state.execution == "sparse"


def _logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    for unit in model.units:
        for parameter in unit.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.set_decision(Threshold(0.0))
    ids = (torch.arange(40)[None] * 13 + 7) % 120
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_types.TYPES if name not in FAMILIES])
def test_no_row_of_the_table_is_taken_for_a_type_that_it_computes_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each type by each row: refused, or what its own code says."""
    try:
        own = RoutedModelForCausalLM.attach(_model(name), ForecasterConfig(rank=8))
    except Exception as error:  # not made here, or refused anyway
        pytest.skip(type(error).__name__)
    if getattr(own.config, "is_heterogeneous", False) or not own.units[0].unit.family.in_parts:
        wanted = None
    else:
        wanted = _logits(own)
    for row in FAMILIES:
        model = _as(monkeypatch, name, row)
        if discover.family_of(model).in_place or model.config.model_type in FAMILIES:
            continue  # the table is not asked for these
        try:
            found = RoutedModelForCausalLM.attach(model, ForecasterConfig(rank=8))
        except (InputError, AttributeError):
            continue
        assert wanted is not None, row
        torch.testing.assert_close(_logits(found), wanted, atol=1e-3, rtol=1e-3)
