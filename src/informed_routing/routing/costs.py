"""What a unit costs in multiply-accumulates and bytes.

MACs are those of the decoder body (projections, scores, FFN), without embeddings, norms and the LM head. K and V
of approximated tokens, every router, and the forecasts that were used are charged against the saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from .routed_unit import RoutedUnit


@dataclass(frozen=True)
class UnitCost:
    """MACs of one unit for one token."""

    always: float
    """Paid for every token: K and V projections."""
    execute: float
    """Paid by executed tokens: Q and O projections, or the FFN."""
    per_key: float
    """Paid by executed tokens for each key they attend to: scores and weighted values."""
    router: float
    forecaster: float
    """Paid by approximated tokens: the forecast, and what the fallback computes of the unit itself."""
    window: int | None = None
    """Keys attended to at most (sliding window)."""
    kv: float = 0
    """Elements of the KV cache read for each key attended to."""
    stream: float = 0
    """Activations read and written for each token: residual stream and normed input, elements."""
    static: bool = False
    """Whether every token is approximated, leaving no keys: nothing of it is always paid."""
    slice: float = 0
    """What of `forecaster` is by weights of the unit itself, which engines hold in the body's format."""

    def keys(self, context: float) -> float:
        """Keys that a token attends to which has `context` of them before it."""
        return min(context, self.window) if self.window else context

    def dense(self, context: float) -> float:
        """MACs of the base model's unit for a token that attends to `context` keys."""
        return self.always + self.execute + self.per_key * self.keys(context)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith("weight") and p.dim() == 2)


def unit_costs(layers: Sequence[nn.Module], units: Sequence[RoutedUnit]) -> list[UnitCost]:
    """Costs of all routed units from the modules that are really there (attached adapters are not counted)."""
    costs = []
    for routed in units:
        layer = layers[routed.index // 2]
        module = cast(Any, routed.unit.module(layer))
        router = 0 if routed.router is None else _weights(routed.router)
        forecaster = 0 if routed.forecaster is None else _weights(routed.forecaster)
        hidden_size, static = routed.hidden_size, routed.is_static
        if routed.kind == "ffn":
            weights = _base_weights(module)
            own = _slice_weights(routed, layer, weights)
            costs.append(
                UnitCost(0, weights, 0, router, forecaster + own, stream=4 * hidden_size, static=static, slice=own)
            )
            continue
        config = module.config
        width, d = config.num_attention_heads * module.head_dim, config.hidden_size
        kv = 2 * d * config.num_key_value_heads * module.head_dim
        window = routed.unit.family.window(config, routed.index // 2)
        heads = 2 * config.num_key_value_heads * module.head_dim
        costs.append(UnitCost(kv, 2 * d * width, 2 * width, router, forecaster, window, heads, 4 * d, static))
    return costs


def _slice_weights(routed: RoutedUnit, layer: nn.Module, weights: int) -> float:
    """Weights of a unit's own neurons that its fallback computes; every neuron has as many."""
    chosen = None if routed.forecaster is None else routed.forecaster.chosen()
    neurons = routed.unit.neurons(layer)
    return 0 if chosen is None or neurons is None else weights * len(chosen) / neurons


def _base_weights(module: nn.Module) -> int:
    return sum(
        p.numel()
        for name, p in module.named_parameters()
        if name.endswith("weight") and p.dim() == 2 and "lora_" not in name
    )
