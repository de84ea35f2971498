"""Granite in the CPU engine: embeddings, scores, updates and logits with factors of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import make_tiny, random_ids
from torch import nn

from informed_routing.config.parts import ForecasterConfig
from informed_routing.execution.cpu import build
from informed_routing.models.head import lm_head
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

FACTORS: dict[str, Any] = {
    **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625},
    "logits_scaling": 6.0,
}


def _routed(fallback: str = "forecaster", target: Any = "update") -> Any:
    torch.manual_seed(0)
    slim = {"slice": 0.25} if fallback == "slim" else {}
    config = ForecasterConfig.model_validate({"rank": 8, "fallback": fallback, "target": target, **slim})
    model = RoutedModelForCausalLM.attach(make_tiny("granite", **FACTORS), config)
    for unit in model.units:
        for parameter in unit.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.set_decision(Threshold(0.0))
    return model


@torch.no_grad()
@pytest.mark.parametrize("target", ["update", "raw"])
@pytest.mark.parametrize("fallback", ["forecaster", "slim"])
def test_the_engine_is_the_torch_back_end(fallback: str, target: Any) -> None:
    model, ids = _routed(fallback, target), random_ids(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.set_execution("masked")
    wanted = model(ids, attention_mask=mask).logits
    model.set_execution("native", weights="float32")
    assert model.runs_native
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[1], wanted[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[0, 4:], wanted[0, 4:], atol=1e-3, rtol=1e-3)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
    torch.testing.assert_close(embedded, found)
    model.set_sparsity(0)
    torch.testing.assert_close(model(ids).logits, make_tiny("granite", **FACTORS)(ids).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_its_head_makes_the_models_logits_and_losses() -> None:
    model, ids = _routed(), random_ids(1, 9)
    model.set_execution("native", weights="float32")
    engine, hidden = model.routing_state.native.of(model), model.hidden_states(ids)[0]
    wanted = lm_head(model)(hidden)
    torch.testing.assert_close(engine.head(hidden), wanted, atol=1e-4, rtol=1e-4)
    losses = nn.functional.cross_entropy(wanted, ids[0], reduction="none")
    torch.testing.assert_close(engine.losses(hidden, ids[0]), losses, atol=1e-4, rtol=1e-4)
    for weights in ("bfloat16", "int8", "int4"):
        model.set_execution("native", weights=weights)  # compared with the torch back ends
