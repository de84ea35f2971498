"""From a routed model's modules to the structures that the engine reads (see source/interface.h)."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...models.families import Family
from ...routing.costs import UnitCost
from ...routing.routed_unit import RoutedUnit

Weights = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: dict[Weights, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
GROUP = 32

_int, _float, _pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Linear(ctypes.Structure):
    _fields_ = (("type", _int), ("n", _int), ("k", _int), ("pad", _int), ("data", _pointer), ("bias", _pointer))


class Routing(ctypes.Structure):
    _fields_ = (
        ("router_in", Linear),
        ("router_out", _pointer),
        ("router_bias", _float),
        ("router_relu", _int),
        ("router_residual", _int),
        ("forecast_in", Linear),
        ("forecast_out", Linear),
        ("forecast_silu", _int),
        ("pad", _int),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in ("q", "kv", "o", "gate_up", "down")),
        ("attention", Routing),
        ("ffn", Routing),
        ("residual", _float),
        ("window", _int),
        ("rope", _int),
        ("gelu", _int),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", _pointer),
        ("head", Linear),
        *((name, _int) for name in ("n_layers", "d", "heads", "kv_heads", "head_dim", "ff", "threads", "kv_type")),
        ("eps", _float),
        ("scale", _float),
        ("qk_eps", _float),
    )


class Prices(ctypes.Structure):
    _fields_ = (("execute", _pointer * 2), ("approximate", _pointer * 2), ("limit", _int))


class Call(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("hidden", "cos", "sin", "valid", "start", "keys", "values", "forced")),
        *((name, _pointer) for name in ("gates", "margins", "executed", "executed_keys", "calls")),
        *((name, _pointer) for name in ("normed", "logits", "seconds")),
        ("prices", Prices),
        *((name, _int) for name in ("batch", "length", "past", "capacity", "keep", "dense")),
        ("threshold", _float),
    )


class Packer:
    """Packs weights and keeps what it packed alive."""

    def __init__(self, library: Any, weights: Weights, threads: int) -> None:
        self.library, self.threads = library, threads
        self.panel = int(library.ir_panel())
        self.body = FORMATS[weights]
        # 4-bit embeddings cost text quality and the head is read once a token: 8 bits there, as GGUF files do.
        self.head = FORMATS["int8"] if weights == "int4" else self.body
        # Forecasters are small and see what is approximated: never below half precision.
        self.forecaster = min(self.body, FORMATS["bfloat16"])
        self.kept: list[Tensor] = []

    def vector(self, values: Tensor | None, *, padded: bool = False) -> int | None:
        """Pointer to float32 values, with zeros up to a whole panel if `padded`."""
        if values is None:
            return None
        values = values.detach().float().reshape(-1)
        if padded:
            values = nn.functional.pad(values, (0, -len(values) % self.panel))
        values = values.contiguous().clone()
        self.kept.append(values)
        return values.data_ptr()

    def linear(self, weight: Tensor, bias: Tensor | None, kind: int) -> Linear:
        """Pack [n, k] weights. Inputs that do not fill groups of 32 stay in half precision."""
        n, k = weight.shape
        if kind > FORMATS["bfloat16"] and k % GROUP:
            kind = FORMATS["bfloat16"]
        source = weight.detach().float().contiguous()
        size = self.library.ir_packed_bytes(kind, n, k)
        packed = torch.empty(size, dtype=torch.uint8)
        self.library.ir_pack(kind, _at(source), n, k, _at(packed), self.threads)
        self.kept.append(packed)
        return Linear(kind, n, k, 0, packed.data_ptr(), self.vector(bias, padded=True))

    def gate_up(self, gate: nn.Linear | tuple[Tensor, Tensor | None], up: Any) -> Linear:
        """Gate and up projections with their rows interleaved by half panels, so that tiles hold pairs."""
        (gate_weight, gate_bias), (up_weight, up_bias) = gate, up  # type: ignore[misc]
        half = self.panel // 2

        def interleave(a: Tensor, b: Tensor) -> Tensor:
            missing = -a.shape[0] % half
            a, b = (nn.functional.pad(t.float(), (0,) * (2 * t.dim() - 1) + (missing,)) for t in (a, b))
            pairs = torch.stack([a.unflatten(0, (-1, half)), b.unflatten(0, (-1, half))], dim=1)
            return pairs.flatten(0, 2)

        bias = None if gate_bias is None or up_bias is None else interleave(gate_bias, up_bias)
        return self.linear(interleave(gate_weight, up_weight), bias, self.body)

    def routing(self, unit: RoutedUnit) -> Routing:
        router, forecast = unit.forms()
        packed = Routing(
            router_out=self.vector(router.outer, padded=True),
            router_bias=router.bias.item(),
            router_relu=router.relu,
            router_residual=unit.reads_residual,
        )
        if router.inner_weight is not None:
            packed.router_in = self.linear(router.inner_weight, router.inner_bias, FORMATS["float32"])
        if forecast is not None:
            missing = -forecast.rank % self.panel
            # Ranks are filled up with directions that read and give nothing.
            packed.forecast_in = self.linear(
                nn.functional.pad(forecast.inner_weight, (0, 0, 0, missing)),
                nn.functional.pad(forecast.inner_bias, (0, missing)),
                self.forecaster,
            )
            packed.forecast_out = self.linear(
                nn.functional.pad(forecast.outer_weight, (0, missing)), forecast.outer_bias, self.forecaster
            )
            packed.forecast_silu = forecast.silu
        return packed

    def layer(self, layer: Any, family: Family, attention: RoutedUnit, ffn: RoutedUnit, cost: UnitCost) -> Layer:
        block: Any = attention.unit.module(layer)
        mlp: Any = ffn.unit.module(layer)
        (q, k, v), (gate, up) = _projections(block, family), _gate_and_up(mlp)
        norms = (getattr(layer, str(family.attention_in_norm)), getattr(layer, str(family.ffn_in_norm)))
        by_head = family.qk_norm == "head"
        bias = None if k[1] is None or v[1] is None else torch.cat([k[1], v[1]])
        packed = Layer(
            attention_norm=self.vector(norms[0].weight),
            ffn_norm=self.vector(norms[1].weight),
            q_norm=self.vector(block.q_norm.weight) if by_head else None,
            k_norm=self.vector(block.k_norm.weight) if by_head else None,
            q=self.linear(*q, self.body),
            kv=self.linear(torch.cat([k[0], v[0]]), bias, self.body),
            o=self.linear(block.o_proj.weight, block.o_proj.bias, self.body),
            gate_up=self.gate_up(gate, up),
            down=self.linear(mlp.down_proj.weight, mlp.down_proj.bias, self.body),
            residual=1.0,
            window=cost.window or 0,
            rope=bool(getattr(block, "use_rope", True)),
            gelu=block.config.hidden_act == "gelu_pytorch_tanh",
        )
        packed.attention = self.routing(attention)
        packed.ffn = self.routing(ffn)
        return packed


Weighted = tuple[Tensor, Tensor | None]


def _projections(attention: Any, family: Family) -> tuple[Weighted, Weighted, Weighted]:
    if family.projections == "fused":
        head_dim, linear = attention.head_dim, attention.qkv_proj
        kv = attention.config.num_key_value_heads * head_dim
        return _split(linear, (attention.config.num_attention_heads * head_dim, kv, kv))  # type: ignore[return-value]
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    return tuple((part.weight, part.bias) for part in parts)  # type: ignore[return-value]


def _gate_and_up(mlp: Any) -> tuple[Weighted, Weighted]:
    if hasattr(mlp, "gate_up_proj"):
        half = mlp.gate_up_proj.out_features // 2
        return _split(mlp.gate_up_proj, (half, half))  # type: ignore[return-value]
    return (mlp.gate_proj.weight, mlp.gate_proj.bias), (mlp.up_proj.weight, mlp.up_proj.bias)


def _split(linear: nn.Linear, rows: tuple[int, ...]) -> tuple[Weighted, ...]:
    biases = (None,) * len(rows) if linear.bias is None else linear.bias.split(rows)
    return tuple(zip(linear.weight.split(rows), biases, strict=True))


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
