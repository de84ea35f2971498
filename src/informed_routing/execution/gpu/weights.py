"""From a routed model's modules to what the kernels read: the model's own weights, copied only where small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...models.families import Family
from ...models.projections import Projection, gate_and_up, head_norms, projections
from ...routing.costs import UnitCost
from ...routing.routed_unit import RoutedUnit
from ..architecture import is_gelu
from ..kernels.matrices import ForecasterWeights, Matrix
from ..kernels.route import RouterWeights

ALIGNMENT = 16
"""Ranks and router widths are filled up to multiples of this: tensor cores take no less."""


@dataclass
class Unit:
    """What both kinds of unit have."""

    norm: Tensor
    eps: float
    router: RouterWeights
    forecaster: ForecasterWeights | None


@dataclass
class Attention(Unit):
    """Weights of an attention."""

    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    query_norm: Tensor | None
    key_norm: Tensor | None
    norm_eps: float
    rope: bool
    window: int


@dataclass
class Ffn(Unit):
    """Weights of a gated FFN."""

    gate: Matrix
    up: Matrix
    down: Matrix
    gelu: bool


def matrix(linear: nn.Module) -> Matrix:
    """A linear layer's weights as they are, torchao's int8 and float8 (one scale for each row) included."""
    weight: Any = linear.weight
    bias = None if linear.bias is None else linear.bias.detach()  # type: ignore[operator]
    data, scale = (getattr(weight, name, None) for name in ("qdata", "scale"))
    if data is None or scale is None:
        return Matrix(weight.detach(), bias)  # type: ignore[arg-type]
    if data.dtype not in (torch.int8, torch.float8_e4m3fn) or scale.numel() != data.shape[0]:
        raise InputError(
            f"quantised weights of {data.dtype} with {scale.numel()} scales cannot be read",
            "Use weight-only int8 or float8 with one scale for each row",
        )
    return Matrix(data, bias, scale.float().reshape(-1))


def part(projection: Projection) -> Matrix:
    """The rows of a linear layer that a projection has."""
    whole, rows = matrix(projection.linear), projection.rows
    if rows is None:
        return whole
    bias, scale = (None if one is None else one[rows] for one in (whole.bias, whole.scale))
    return Matrix(whole.weight[rows], bias, scale)


def _filled(weight: Tensor, bias: Tensor, dtype: torch.dtype, dim: int) -> Matrix:
    """Weights in `dtype` with zeros up to the alignment along `dim` (0: outputs, 1: inputs)."""
    missing = -weight.shape[dim] % ALIGNMENT
    by_dim = (0, missing) if dim == 1 else (0, 0, 0, missing)
    bias = bias if dim == 1 else nn.functional.pad(bias, (0, missing))
    return Matrix(nn.functional.pad(weight.detach(), by_dim).to(dtype).contiguous(), bias.detach().float())


def router_weights(unit: RoutedUnit, dtype: torch.dtype) -> RouterWeights:
    """A unit's router, filled up to whole tiles."""
    form, _ = unit.forms()
    assert form is not None  # static layers do not come here
    outer, bias = form.outer.float().contiguous(), form.bias.float()
    if form.inner_weight is None or form.inner_bias is None:
        return RouterWeights(None, None, outer, bias, False, unit.reads_residual)
    inner = _filled(form.inner_weight, form.inner_bias, dtype, 0)
    outer = nn.functional.pad(outer, (0, inner.rows - len(outer)))
    return RouterWeights(inner.weight, inner.bias, outer, bias, form.relu, unit.reads_residual)


def forecaster_weights(unit: RoutedUnit, dtype: torch.dtype) -> ForecasterWeights | None:
    """A unit's forecaster, filled up to whole tiles; None where approximated tokens get nothing."""
    _, form = unit.forms()
    if form is None:
        return None
    return ForecasterWeights(
        _filled(form.inner_weight, form.inner_bias, dtype, 0),
        _filled(form.outer_weight, form.outer_bias, dtype, 1),
        form.silu,
    )


def attention(layer: Any, family: Family, routed: RoutedUnit, cost: UnitCost, dtype: torch.dtype) -> Attention:
    """An attention unit's weights, views of the model's wherever that can be."""
    block: Any = routed.unit.module(layer)
    q, k, v = projections(family, block)
    norm: Any = routed.unit.input_norm(layer)
    query_norm, key_norm = head_norms(family, block)
    return Attention(
        norm=norm.weight.detach(),
        eps=norm.variance_epsilon,
        router=router_weights(routed, dtype),
        forecaster=forecaster_weights(routed, dtype),
        query=part(q),
        key=part(k),
        value=part(v),
        out=matrix(block.o_proj),
        query_norm=None if query_norm is None else query_norm.weight.detach(),
        key_norm=None if key_norm is None else key_norm.weight.detach(),
        norm_eps=1e-6 if query_norm is None else query_norm.variance_epsilon,
        rope=family.has_rope(block),
        window=cost.window or 0,
    )


def ffn(layer: Any, family: Family, routed: RoutedUnit, dtype: torch.dtype) -> Ffn:
    """An FFN unit's weights, views of the model's wherever that can be."""
    mlp: Any = routed.unit.module(layer)
    gate, up = gate_and_up(family, mlp)
    norm: Any = routed.unit.input_norm(layer)
    return Ffn(
        norm=norm.weight.detach(),
        eps=norm.variance_epsilon,
        router=router_weights(routed, dtype),
        forecaster=forecaster_weights(routed, dtype),
        gate=part(gate),
        up=part(up),
        down=matrix(mlp.down_proj),
        gelu=is_gelu(family, getattr(layer, family.attention or "").config),
    )
