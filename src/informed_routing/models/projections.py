"""The linear layers of attention and FFN as the family's row says they are stored: each alone, or fused with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .families import Family


@dataclass(frozen=True)
class Projection:
    """Some outputs of a linear layer: all of them, or the `rows` that a fused layer has for them."""

    linear: Any
    rows: slice | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., outputs] of [..., inputs]. An adapter or a quantised layer runs as it is, whole."""
        if self.rows is None:
            return self.linear(x)
        if type(self.linear) is nn.Linear:
            return nn.functional.linear(x, self.weight, self.bias)
        return self.linear(x)[..., self.rows]

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], a view."""
        return self.linear.weight if self.rows is None else self.linear.weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """[outputs], a view; None where there is none."""
        bias = self.linear.bias
        return bias if bias is None or self.rows is None else bias[self.rows]


class Projections(NamedTuple):
    """What an attention makes of its input."""

    q: Projection
    k: Projection
    v: Projection

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [..., kv_heads * head_dim]; one product where the layer is one."""
        if self.k.rows is None or self.v.rows is None:
            return self.k(x), self.v(x)
        keys, values = Projection(self.k.linear, slice(self.k.rows.start, self.v.rows.stop))(x).chunk(2, dim=-1)
        return keys, values


def projections(family: Family, attention: Any) -> Projections:
    """Queries, keys and values of an attention."""
    if family.qkv == "split":
        return Projections(*(Projection(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)))
    queries = attention.config.num_attention_heads * attention.head_dim
    keys = attention.config.num_key_value_heads * attention.head_dim
    return Projections(*_parts(attention.qkv_proj, queries, keys, keys))


def gate_and_up(family: Family, mlp: Any) -> tuple[Projection, Projection]:
    """The two projections of a gated FFN whose product, one of them activated, goes down."""
    if family.gate_up == "split":
        return Projection(mlp.gate_proj), Projection(mlp.up_proj)
    half = mlp.gate_up_proj.out_features // 2
    gate, up = _parts(mlp.gate_up_proj, half, half)
    return gate, up


def head_norms(family: Family, attention: Any) -> tuple[Any, Any]:
    """The norms of each head's queries and keys; None for both where there are none."""
    return (attention.q_norm, attention.k_norm) if family.qk_norm == "head" else (None, None)


def _parts(linear: Any, *sizes: int) -> list[Projection]:
    """The parts of a fused layer, by their numbers of rows."""
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [Projection(linear, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
