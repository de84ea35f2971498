"""What a dense, pruned or sliced decoder costs, counted from the modules that are really there; works on `meta` too."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..models.discover import listed_family_of
from ..routing.costs import UnitCost


class Footprint(BaseModel):
    """Parameters, arithmetic and cache of one model. The body is the decoder layers, without embeddings and head."""

    model_config = ConfigDict(frozen=True)

    parameters: int
    """All, tied ones once."""
    body_parameters: int
    macs: float
    """Multiply-accumulates of the body for one token that attends to `context` keys."""
    kv_elements: int
    """Elements that the KV cache grows by with each token (a sliding window also forgets as many)."""
    context: float

    def kv_bytes(self, element_size: int) -> int:
        """Bytes of the KV cache for each token, at `element_size` bytes an element."""
        return self.kv_elements * element_size


def footprint(model: Any, context: float) -> Footprint:
    """Count a causal language model without live adapters. A sequence of n tokens has the mean context (n + 1) / 2."""
    layers = model.model.layers
    family = listed_family_of(model)
    macs, kv = 0.0, 0
    for index, layer in enumerate(layers):
        attention = getattr(layer, family.attention or "", None)
        per_key = 0
        if attention is not None:
            per_key = 2 * model.config.num_attention_heads * attention.head_dim
            kv += 2 * model.config.num_key_value_heads * attention.head_dim
        cost = UnitCost(0, _linear_weights(layer), per_key, 0, 0, family.window(model.config, index))
        macs += cost.dense(context)
    return Footprint(
        parameters=_parameters(model),
        body_parameters=_parameters(layers),
        macs=macs,
        kv_elements=kv,
        context=context,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear_weights(module: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
