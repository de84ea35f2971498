"""What a unit costs in multiply-accumulates and bytes.

MACs are those of the decoder body (projections, scores, FFN), without embeddings, norms and the LM head. K and V
of approximated tokens, every router, and the forecasts that were used are charged against the saving.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from ..errors import InputError
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
    always_per_key: float = 0
    """Paid by every token for each key it attends to: scores of attentions that run whole."""
    slice: float = 0
    """What of `forecaster` is by weights of the unit itself, which engines hold in the body's format."""

    def keys(self, context: float) -> float:
        """Keys that a token attends to which has `context` of them before it."""
        return min(context, self.window) if self.window else context

    def dense(self, context: float) -> float:
        """MACs of the base model's unit for a token that attends to `context` keys."""
        return self.kept(context) + self.execute + self.per_key * self.keys(context)

    def kept(self, context: float) -> float:
        """MACs of them that approximated tokens need, too."""
        return self.always + self.always_per_key * self.keys(context)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith("weight") and p.dim() == 2)


def unit_costs(layers: Sequence[nn.Module], units: Sequence[RoutedUnit], settings: Any = None) -> list[UnitCost]:
    """Costs of all routed units from the modules that are really there (attached adapters are not counted).

    `settings` is the decoder's configuration, for modules that keep none.
    """
    costs = []
    for routed in units:
        layer = layers[routed.index // 2]
        router = 0 if routed.router is None else _weights(routed.router)
        forecaster = 0 if routed.forecaster is None else _weights(routed.forecaster)
        hidden_size, static = routed.hidden_size, routed.is_static
        if routed.kind == "ffn":
            own_settings = _settings(layer, settings)
            weights = sum(active_weights(part, own_settings) for part in routed.unit.modules(layer))
            own = _slice_weights(routed, layer, weights)
            costs.append(
                UnitCost(0, weights, 0, router, forecaster + own, stream=4 * hidden_size, static=static, slice=own)
            )
            continue
        if not routed.unit.family.in_parts:
            whole = _whole_attention(routed.unit.modules(layer), _settings(layer, settings), hidden_size)
            if not routed.always_executes:
                mixer = cast(Any, routed.unit.module(layer))
                private = sum(mixer.get_submodule(name).weight.numel() for name in routed.unit.family.private)
                whole = replace(whole, always=whole.execute - private, execute=private)
                whole = replace(whole, always_per_key=whole.per_key, per_key=0, router=router, forecaster=forecaster)
            costs.append(whole)
            continue
        module = cast(Any, routed.unit.module(layer))
        config = cast(Any, getattr(module, "config", None))
        width, d = config.num_attention_heads * module.head_dim, config.hidden_size
        kv = 2 * d * config.num_key_value_heads * module.head_dim
        window = routed.unit.family.window(config, routed.index // 2)
        heads = 2 * config.num_key_value_heads * module.head_dim
        costs.append(UnitCost(kv, 2 * d * width, 2 * width, router, forecaster, window, heads, 4 * d, static))
    return costs


def _slice_weights(routed: RoutedUnit, layer: nn.Module, weights: float) -> float:
    """Weights of a unit's own neurons that its fallback computes; every neuron has as many."""
    chosen = None if routed.forecaster is None else routed.forecaster.chosen()
    neurons = routed.unit.neurons(layer)
    return 0 if chosen is None or neurons is None else weights * len(chosen) / neurons


def _settings(layer: nn.Module, other: Any) -> Any:
    """The configuration that a layer's modules were made from, if one keeps it; else another."""
    return next((config for part in layer.modules() if (config := getattr(part, "config", None)) is not None), other)


def _whole_attention(modules: Sequence[nn.Module], settings: Any, hidden_size: int) -> UnitCost:
    """Mixers of tokens that run whole: their matrices, and scores and values where they have heads that see keys."""
    matrices = per_key = kv = 0.0
    for module in modules:
        config = getattr(module, "config", settings)
        if getattr(config, "is_heterogeneous", False):  # layers have settings of their own
            config = config.per_layer_config[module.layer_idx] if hasattr(module, "layer_idx") else None
        heads = getattr(config, "num_attention_heads", None)
        head = getattr(module, "head_dim", None)
        if head is None and heads and _attends(module):
            head = config.hidden_size // heads
        keys, values = getattr(module, "qk_head_dim", head), getattr(module, "v_head_dim", head)
        if isinstance(keys, int) and isinstance(values, int) and heads:
            per_key += heads * (keys + values)
            kv += (getattr(config, "num_key_value_heads", None) or heads) * (keys + values)
        try:
            matrices += active_weights(module, config)
        except InputError:  # stacks of matrices that are no experts
            matrices += sum(part.numel() for name, part in module.named_parameters() if part.dim() > 1)
    return UnitCost(0, matrices, per_key, 0, 0, None, kv, 4 * hidden_size)


def _attends(module: nn.Module) -> bool:
    """Whether a module is told which keys to attend to, and keeps no state of a recurrence in their place."""
    told = inspect.signature(type(module).forward).parameters
    return any("mask" in name for name in told) and not any(isinstance(part, nn.Conv1d) for part in module.modules())


_ACTIVE = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts", "top_k"),
    "num_selected_experts",
)
"""What configurations and modules call the number of experts that a token goes to."""


def active_weights(module: nn.Module, config: Any) -> float:
    """Elements of the matrices that a token is multiplied with: of a stack of experts, of as many as it goes to.

    Raises InputError where nothing says how many experts that is.
    """
    total = 0.0
    for name, parameter in module.named_parameters():
        parent, _, own = name.rpartition(".")
        if "lora_" in name or parameter.dim() not in (2, 3) or "bias" in own:
            continue
        holder = module.get_submodule(parent)
        if parameter.dim() == 3:
            experts = 1 if isinstance(holder, nn.Conv1d) or _runs_all(holder) else len(parameter)
        else:
            experts = _experts(module, name) if own == "weight" else _on_top(holder, parameter)
        total += parameter.numel() * (1 if experts == 1 else _visited(module, config, experts) / experts)
    return total


def _runs_all(experts: nn.Module) -> bool:
    """Whether a stack of experts computes each of them for every token, since it is not told which (Llama 4)."""
    return len(inspect.signature(type(experts).forward).parameters) == 2


def _experts(module: nn.Module, name: str) -> int:
    """How many like it a matrix lies beside: experts in a list; 1 for one that every token meets."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        beside = module.get_submodule(".".join(parts[:place]))
        if part.isdigit() and isinstance(beside, nn.ModuleList):
            return len(beside)
    return 1


def _on_top(holder: nn.Module, matrix: nn.Parameter) -> int:
    """How many experts' matrices lie on top of each other in one; 1 where its module names no number of experts."""
    for name in ("moe_num_experts", "num_experts"):
        count = getattr(holder, name, None)
        if isinstance(count, int) and count > 1 and len(matrix) % count == 0:
            return count
    return 1


def _visited(module: nn.Module, config: Any, experts: int) -> int:
    """How many of its experts a token goes to."""
    for source in (*module.modules(), config):
        for name in _ACTIVE:
            count = getattr(source, name, None)
            if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= experts:
                return count
    raise InputError(
        f"a {type(module).__name__} has {experts} experts, and nothing says how many a token goes to",
        "Its cost is not known: use another model",
    )
