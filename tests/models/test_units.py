"""Units in parts give what the base model's own modules give whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, make_tiny
from torch import Tensor

from informed_routing.models.calls import Call
from informed_routing.models.families import FAMILIES as TABLE
from informed_routing.models.units import Unit, attend, attend_causal, keys_values, only_whole, queries

EVERY = (*FAMILIES, "olmo3", "granite")


def _rope(model: Any, x: Tensor, layer: int) -> Any:
    places = torch.arange(x.shape[1])[None]
    kinds: Any = getattr(model.config, "layer_types", None)
    try:
        return model.model.rotary_emb(x, places)
    except (AttributeError, TypeError, KeyError):  # one table for each kind of layer
        return model.model.rotary_emb(x, places, kinds[layer])


@pytest.mark.parametrize("name", EVERY)
def test_attention_in_parts_is_the_module(name: str) -> None:
    model, family = make_tiny(name), TABLE[name]
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, 7, 7).masked_fill(~causal, torch.finfo(torch.float32).min)
    for place, layer in enumerate(model.model.layers):
        attention = getattr(layer, family.attention or "")
        rope = _rope(model, x, place)
        with torch.no_grad():
            wanted = attention(x, position_embeddings=rope, attention_mask=additive)[0]
            keys, values = keys_values(family, attention, x, rope)
            q = queries(family, attention, x, rope)
            found = attend(family, attention, q, keys, values, additive)
            last = torch.arange(7)[None].expand(2, -1)
            blocks = attend_causal(family, attention, q, keys, values, last, 3)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(blocks, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_two_units_are_the_layer(name: str) -> None:
    model, family = make_tiny(name), TABLE[name]
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    layer, rope = model.model.layers[0], _rope(model, x, 0)
    with torch.no_grad():
        wanted = layer(x, position_embeddings=rope, attention_mask=None)
        hidden = x
        for kind in ("attention", "ffn"):
            unit = Unit(kind, family)  # type: ignore[arg-type]
            call = Call({"position_embeddings": rope, "attention_mask": None})
            output = unit.run(layer, unit.normed(layer, hidden), call)
            hidden = hidden + unit.update(layer, output)
            assert (unit.input_norm(layer) is None) == (not unit.has_input_norm)
    torch.testing.assert_close(hidden, wanted[0] if isinstance(wanted, tuple) else wanted)


def test_what_is_left_to_the_module_is_said() -> None:
    attention = make_tiny("llama").model.layers[0].self_attn
    family = TABLE["llama"]
    assert only_whole(family, attention, Call({})) is None
    assert "whose code is not known" in str(only_whole(replace(family, in_parts=False), attention, Call({})))
    handle = attention.register_forward_hook(lambda *_: None)
    assert "hooked" in str(only_whole(family, attention, Call({})))
    handle.remove()
