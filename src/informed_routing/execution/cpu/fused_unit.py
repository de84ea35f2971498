"""Units for training on a CPU in bfloat16: the base model's layers with what lies between their products fused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.calls import Call, is_watched
from ...models.head import PLAIN, logit_scaling
from ...models.projections import gate_and_up, projections
from ...models.units import Unit, only_whole
from ..architecture import activation_known, is_gelu
from . import fused


@dataclass(frozen=True)
class FusedUnit(Unit):
    """A `Unit` whose arithmetic is that of fused.py; what that does not know, the base model's own modules do."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)
    """The last input of an FFN and its neurons' activations, of which a slice is a part."""

    def stream(self, hidden: Tensor) -> Tensor:
        return hidden.float()

    def normed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        norm = self.input_norm(layer)
        return fused.norm(self.stream(hidden), norm.weight.float(), norm.variance_epsilon)

    def run(self, layer: nn.Module, x: Tensor, call: Call) -> Tensor:
        module: Any = self.module(layer)
        if self.kind == "ffn":
            inner = self.activations(layer, x)
            self.seen[:] = [(x, inner)]
            return module.down_proj(inner)
        drops = module.training and module.attention_dropout
        if drops or call.rope is None or call.mask is not None or call.cache is not None:
            return super().run(layer, x, call)
        if x.shape[1] % fused.MULTIPLE or only_whole(self.family, module, call):
            return super().run(layer, x, call)
        made = projections(self.family, module)
        q, (k, v) = made.q(x), made.keys_values(x)
        q, k, v = (part.unflatten(-1, (-1, module.head_dim)) for part in (q, k, v))
        if self.family.qk_norm == "head":
            q, k = (_on_heads(norm, part) for norm, part in ((module.q_norm, q), (module.k_norm, k)))
        if self.family.has_rope(module):
            cos, sin = (part.float().contiguous() for part in call.rope)
            q, k = fused.rotate(q, cos, sin), fused.rotate(k, cos, sin)
        return module.o_proj(fused.attend(q, k, v, self.family.scale(module)).flatten(2))

    def activations(self, layer: nn.Module, x: Tensor) -> Tensor:
        module: Any = self.module(layer)
        gate, up = gate_and_up(self.family, module)
        return fused.gated(gate(x), up(x), gelu=is_gelu(self.family, module.config))

    def run_slice(self, layer: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        down: Any = self.module(layer).down_proj  # type: ignore[union-attr]
        if not (self.seen and self.seen[0][0] is x and type(down) is nn.Linear):
            return super().run_slice(layer, x, index)
        inner = self.seen[0][1].index_select(-1, index)
        return F.linear(inner, down.weight.index_select(1, index), down.bias)

    def mixed(self, hidden: Tensor, gate: Tensor, executed: Tensor, approximated: Tensor) -> Tensor:
        self.seen.clear()
        return fused.mix(hidden, gate.float(), executed, approximated)


def _on_heads(norm: Any, x: Tensor) -> Tensor:
    """A norm of each head of bfloat16 [B, N, heads, size]."""
    return fused.norm(x.float(), norm.weight.float(), norm.variance_epsilon)


def fuse(model: Any) -> bool:
    """Have a routed model's units train by fused arithmetic where all of it is known; False where it stays as it is.

    That takes a model in bfloat16 on a CPU with matrix instructions for it, of a family that the engine knows.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not _known(model):
        return False
    for routed in model.units:
        given = {part.name: getattr(routed.unit, part.name) for part in dataclasses.fields(Unit)}
        routed.unit = FusedUnit(**given)
    return True


def is_fused(model: Any) -> bool:
    """Whether `fuse` has done its work on a model."""
    return all(isinstance(routed.unit, FusedUnit) for routed in model.units)


def _known(model: Any) -> bool:
    family, config = model.units[0].unit.family, model.config
    if any("cpu" not in routed.unit.family.native for routed in model.units):
        return False
    if not activation_known(family, config) or logit_scaling(family, config) != PLAIN:
        return False
    if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return False
    if any(is_watched(module) for module in model.decoder.layers.modules()):
        return False
    for layer, unit in ((model.decoder.layers[unit.index // 2], unit.unit) for unit in model.units):
        norm = unit.input_norm(layer)
        if not (type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")):
            return False
    attention = model.units[0].unit.module(model.decoder.layers[0])
    widths = (config.hidden_size, config.intermediate_size, attention.head_dim // 2)
    if any(width % fused.MULTIPLE for width in widths):
        return False
    return fused.available()
