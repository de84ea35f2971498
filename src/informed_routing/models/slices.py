"""A slice of a gated FFN: what some of its neurons put out, computed by the unit's own weights.

A neuron is one product act(gate x) * up x and the column of the down projection that it goes through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .families import Family
from .projections import Projection, gate_and_up


def neurons(family: Family, mlp: Any) -> int | None:
    """How many neurons an FFN has; None where it is not known as a gated one."""
    parts = {"split": ("gate_proj", "up_proj"), "fused": ("gate_up_proj",), None: ()}[family.gate_up]
    if not parts or not all(hasattr(mlp, name) for name in (*parts, "down_proj", family.ffn_activation)):
        return None
    return int(mlp.down_proj.in_features)


def activations(family: Family, mlp: Any, x: Tensor, index: Tensor | None = None) -> Tensor:
    """act(gate x) * up x of the neurons `index` int64 [k], or of all: [..., k] for the normed input [..., d]."""
    gate, up = (_outputs(part, x, index) for part in gate_and_up(family, mlp))
    return getattr(mlp, family.ffn_activation)(gate) * up


def slice_output(family: Family, mlp: Any, x: Tensor, index: Tensor) -> Tensor:
    """The FFN's output [..., d] with the neurons `index` int64 [k] alone, and the bias of its down projection if any.

    Adapters and quantised layers, which are known only whole, are computed whole.
    """
    inner, down = activations(family, mlp, x, index), mlp.down_proj
    if _is_plain(down):
        return F.linear(inner, down.weight.index_select(1, index), down.bias)
    return down(inner.new_zeros(*inner.shape[:-1], down.in_features).index_copy(-1, index, inner))


def column_squares(mlp: Any) -> Tensor:
    """Squared length of what each neuron adds to the output at an activation of 1: [neurons] float32."""
    return mlp.down_proj.weight.detach().float().square().sum(0)


def _outputs(part: Projection, x: Tensor, index: Tensor | None) -> Tensor:
    """Some outputs of a projection: [..., k]."""
    if index is None:
        return part(x)
    if not _is_plain(part.linear):
        return part(x).index_select(-1, index)
    bias = part.bias
    return F.linear(x, part.weight.index_select(0, index), None if bias is None else bias.index_select(0, index))


def _is_plain(linear: Any) -> bool:
    """Whether rows and columns of a layer's weight are what it computes with."""
    return type(linear) is nn.Linear and type(linear.weight) in (Tensor, nn.Parameter)


def chosen_first(index: Tensor, of: int) -> Tensor:
    """All `of` neurons, those in `index` int64 [k] before the others, each ascending: int64 [of]."""
    others = torch.ones(of, dtype=torch.bool, device=index.device).index_fill(0, index, False)
    return torch.cat([index, others.nonzero()[:, 0]])


def most_important(importance: Tensor, count: int) -> Tensor:
    """The `count` largest of [n], ascending by place: int64 [count]."""
    return torch.topk(importance, count).indices.sort().values
