"""Projections are the same numbers however a family stores them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, make_tiny
from torch import nn

from informed_routing.execution.gpu.weights import matrix, part
from informed_routing.models.families import FAMILIES as TABLE
from informed_routing.models.projections import Projection, gate_and_up, head_norms, projections

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


def _layer(name: str) -> Any:
    return make_tiny(name).model.layers[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_products_are_those_of_the_modules(name: str) -> None:
    layer, family = _layer(name), TABLE[name]
    q, k, v = projections(family, layer.self_attn)
    with torch.no_grad():
        if family.qkv == "fused":
            wanted = layer.self_attn.qkv_proj(X).split((64, 32, 32), dim=-1)
        else:
            wanted = layer.self_attn.q_proj(X), layer.self_attn.k_proj(X), layer.self_attn.v_proj(X)
        for one, expected in zip((q(X), k(X), v(X)), wanted, strict=True):
            torch.testing.assert_close(one, expected)
        keys, values = projections(family, layer.self_attn).keys_values(X)
        torch.testing.assert_close((keys, values), wanted[1:])
        gate, up = gate_and_up(family, layer.mlp)
        down = layer.mlp.down_proj(layer.mlp.act_fn(gate(X)) * up(X)) if hasattr(layer.mlp, "act_fn") else None
        if down is None:
            down = layer.mlp.down_proj(layer.mlp.activation_fn(gate(X)) * up(X))
        torch.testing.assert_close(down, layer.mlp(X))


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_every_reader_gets_the_same_weights(name: str) -> None:
    layer, family = _layer(name), TABLE[name]
    for projection in (*projections(family, layer.self_attn), *gate_and_up(family, layer.mlp)):
        on_device = part(projection)
        assert torch.equal(on_device.weight, projection.weight)
        with torch.no_grad():
            product = nn.functional.linear(X, projection.weight, projection.bias)
            torch.testing.assert_close(projection(X), product)
        if projection.bias is None:
            assert on_device.bias is None
        else:
            assert torch.equal(on_device.bias, projection.bias)  # type: ignore[arg-type]


def test_rows_of_a_fused_layer_are_views_with_their_bias() -> None:
    fused = nn.Linear(4, 6)
    projection = Projection(fused, slice(2, 5))
    assert projection.weight.data_ptr() == fused.weight[2:].data_ptr()
    assert torch.equal(projection.bias, fused.bias[2:5])  # type: ignore[arg-type]
    assert part(Projection(fused)).weight.shape == matrix(fused).weight.shape


def test_a_wrapped_fused_layer_runs_whole() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    fused = Adapter(4, 6)
    x = torch.randn(3, 4)
    assert torch.equal(Projection(fused, slice(2, 5))(x), fused(x)[..., 2:5])


def test_norms_of_heads() -> None:
    for name, whether in (("qwen3", True), ("olmo2", False), ("llama", False)):
        attention = _layer(name).self_attn
        query, key = head_norms(TABLE[name], attention)
        assert (query is not None) == (key is not None) == whether
