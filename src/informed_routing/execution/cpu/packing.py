"""From a routed model's modules to the structures that the engine reads (interface.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...models.families import Family
from ...models.projections import Projection, gate_and_up, head_norms, projections
from ...models.slices import chosen_first
from ...routing.costs import UnitCost
from ...routing.routed_unit import RoutedUnit
from ..architecture import is_gelu
from ..formats import FORMATS, GROUP, Format, Packed
from .interface import Layer, Linear, Routing


class Packer:
    """Packs weights and keeps what it packed alive."""

    def __init__(self, library: Any, weights: Packed, threads: int) -> None:
        self.library, self.threads = library, threads
        self.panel = int(library.ir_panel())
        self.body = FORMATS[weights]
        self.head, self.forecaster = self.body.of("head"), self.body.of("forecaster")
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

    def linear(self, weight: Tensor, bias: Tensor | None, kind: Format) -> Linear:
        """Pack [n, k] weights. Raises InputError for a format that the engine does not pack."""
        n, k = weight.shape
        if kind.group_bytes and k % GROUP:
            kind = kind.of("ungrouped")
        source = weight.detach().float().contiguous()
        size = -1 if kind.id is None else self.library.ir_packed_bytes(kind.id, n, k)
        if size < 0:
            raise InputError(f"the native engine does not pack weights in {kind.name}", "Use another format")
        packed = torch.empty(size, dtype=torch.uint8)
        self.library.ir_pack(kind.id, _at(source), n, k, _at(packed), self.threads)
        self.kept.append(packed)
        return Linear(kind.id, n, k, k, packed.data_ptr(), self.vector(bias, padded=True))

    def ffn(self, family: Family, mlp: Any, slice_: Tensor | None) -> dict[str, Linear]:
        """A gated FFN, and as parts of the same weights what it computes for the neurons `slice_` int64 [k] alone.

        Neurons are packed with these first: the first panels of gate_up, the first inputs of down.
        """
        gate, up = gate_and_up(family, mlp)
        rows, bias = mlp.down_proj.weight, mlp.down_proj.bias
        if slice_ is None:
            return {"gate_up": self.gate_up(gate, up), "down": self.linear(rows, bias, self.body)}
        order = chosen_first(slice_, rows.shape[1])
        gate_up, down = self.gate_up(gate, up, order), self.linear(rows[:, order], bias, self.body)
        return {
            "gate_up": gate_up,
            "down": down,
            "gate_up_slice": _part(gate_up, 2 * len(slice_), gate_up.k),
            "down_slice": _part(down, down.n, len(slice_)),
        }

    def gate_up(self, gate: Projection, up: Projection, order: Tensor | None = None) -> Linear:
        """Gate and up projections with their rows, in an `order`, interleaved by half panels: tiles hold pairs."""
        half = self.panel // 2

        def interleave(a: Tensor, b: Tensor) -> Tensor:
            if order is not None:
                a, b = a[order], b[order]
            missing = -a.shape[0] % half
            a, b = (nn.functional.pad(t.float(), (0,) * (2 * t.dim() - 1) + (missing,)) for t in (a, b))
            pairs = torch.stack([a.unflatten(0, (-1, half)), b.unflatten(0, (-1, half))], dim=1)
            return pairs.flatten(0, 2)

        bias = None if gate.bias is None or up.bias is None else interleave(gate.bias, up.bias)
        return self.linear(interleave(gate.weight, up.weight), bias, self.body)

    def routing(self, unit: RoutedUnit, residual: float) -> Routing:
        """Router (where it has one) and forecaster of a unit, packed; what is raw is multiplied by `residual`."""
        router, forecast = unit.forms()
        packed = Routing()
        if router is not None:
            packed.router_out = self.vector(router.outer, padded=True)
            packed.router_bias, packed.router_relu = router.bias.item(), router.relu
            packed.router_residual = unit.reads_residual
            if router.inner_weight is not None:
                packed.router_in = self.linear(router.inner_weight, router.inner_bias, FORMATS["float32"])
        if forecast is not None:
            missing, factor = -forecast.rank % self.panel, residual if unit.predicts_raw else 1.0
            # Ranks are filled up with directions that read and give nothing.
            packed.forecast_in = self.linear(
                nn.functional.pad(forecast.inner_weight, (0, 0, 0, missing)),
                nn.functional.pad(forecast.inner_bias, (0, missing)),
                self.forecaster,
            )
            packed.forecast_out = self.linear(
                nn.functional.pad(forecast.outer_weight, (0, missing)) * factor,
                forecast.outer_bias * factor,
                self.forecaster,
            )
            packed.forecast_silu = forecast.silu
        return packed

    def layer(self, layer: Any, family: Family, attention: RoutedUnit, ffn: RoutedUnit, cost: UnitCost) -> Layer:
        """A decoder layer, packed."""
        block: Any = attention.unit.module(layer)
        mlp: Any = ffn.unit.module(layer)
        _, forecast = ffn.forms()
        residual = 1.0 if family.residual_scale is None else float(getattr(layer, family.residual_scale))
        q, k, v = projections(family, block)
        query_norm, key_norm = head_norms(family, block)
        bias = None if k.bias is None or v.bias is None else torch.cat([k.bias, v.bias])
        packed = Layer(
            attention_norm=self.vector(attention.unit.input_norm(layer).weight),
            ffn_norm=self.vector(ffn.unit.input_norm(layer).weight),
            q_norm=None if query_norm is None else self.vector(query_norm.weight),
            k_norm=None if key_norm is None else self.vector(key_norm.weight),
            q=self.linear(q.weight, q.bias, self.body),
            kv=self.linear(torch.cat([k.weight, v.weight]), bias, self.body),
            o=self.linear(block.o_proj.weight, block.o_proj.bias, self.body),
            **self.ffn(family, mlp, None if forecast is None else forecast.slice),
            residual=residual,
            window=cost.window or 0,
            rope=family.has_rope(block),
            gelu=is_gelu(family, block.config),
            is_static=ffn.is_static,
        )
        packed.attention = self.routing(attention, residual)
        packed.ffn = self.routing(ffn, residual)
        return packed


def _part(whole: Linear, n: int, k: int) -> Linear:
    """The first n outputs of a packed layer, which read its first k inputs: the same weights."""
    return Linear(whole.type, n, k, whole.packed, whole.data, whole.bias)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
