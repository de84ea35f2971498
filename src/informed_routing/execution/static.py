"""Static layers: one forecast of the whole layer's update for every token; no attention, no router, no keys.

The layer's own modules run only as the original model: for whoever asks for it, and as what a fit learns from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.calls import NOTHING, Call
from ..routing.state import RoutingState


def run(layer: Any, state: RoutingState, hidden: Tensor, call: Call) -> Tensor:
    """The residual stream [B, N, d] behind a static layer, by its forecaster or, where the rule says so, by itself."""
    attention, ffn = layer.attention_routing, layer.ffn_routing
    hidden = ffn.unit.stream(hidden)
    if state.original:
        check_cache(call.cache, attention.unit.module(layer).layer_idx, hidden.shape[1])
        after = _original(layer, hidden, call)
        if state.observer is not None and ffn.forecaster is not None:
            update = after - hidden
            ffn.observe(state, layer, hidden, ffn.unit.normed(layer, hidden), update, update, None, after)
        return after
    attention.decide(state, hidden, hidden)
    gate = ffn.decide(state, hidden, hidden)
    if ffn.forecaster is None:
        return hidden
    x = ffn.unit.normed(layer, hidden)
    after = hidden + ffn.forecast(layer, ffn.features(hidden, x), x)
    if state.observer is not None:
        with torch.no_grad():
            update = _original(layer, hidden, call) - hidden
        ffn.observe(state, layer, hidden, x, update, update, gate, after)
    return after


def check_cache(cache: Any, place: int, length: int) -> None:
    """Raises InputError for a cache that lacks keys of a static layer, whose original needs them.

    `length` tokens are in the cache's first layer already, and not yet in that of the layer at `place`.
    """
    if cache is not None and cache.get_seq_length(place) + length != cache.get_seq_length():
        raise InputError(
            f"the cache has no keys of layer {place}, which was static: the original model cannot go on with it",
            "Use a fresh cache",
        )


def _original(layer: Any, hidden: Tensor, call: Call) -> Tensor:
    for routed, told in ((layer.attention_routing, call), (layer.ffn_routing, NOTHING)):
        unit = routed.unit
        hidden = hidden + unit.update(layer, unit.run(layer, unit.normed(layer, hidden), told))
    return hidden
