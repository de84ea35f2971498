"""The reference back end: both branches for every token, mixed by the gate. Sampled decisions train here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..routing.routed_unit import RoutedUnit, RoutingState


def run(routed: RoutedUnit, state: RoutingState, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One routed unit on the residual stream [B, N, d]; returns the updated stream.

    With every gate at 1 the result equals the base model's bit for bit: `1 * y + 0 * f` is exactly `y`.
    """
    unit = routed.unit
    x = unit.normed(layer, hidden)
    if state.dense:
        raw = unit.run(layer, x, kwargs)
        update = unit.update(layer, raw)
        after = hidden + update
        routed.observe(state, hidden, routed.features(hidden, x), raw, update, None, after)
        return after
    features = routed.features(hidden, x)
    gate = routed.decide(state, hidden, features)
    if routed.kind == "attention" and state.kv == "drop":
        kwargs = _without_approximated_keys(routed.unit.module(layer), gate, kwargs, hidden.dtype)
    raw = unit.run(layer, x, kwargs)
    update = unit.update(layer, raw)
    forecast = routed.forecast(layer, features)
    if gate.dtype == torch.bool:
        after = hidden + torch.where(gate.unsqueeze(-1), update, forecast)
    else:
        weight = gate.unsqueeze(-1).to(update.dtype)
        after = hidden + (weight * update + (1 - weight) * forecast)
    routed.observe(state, hidden, features, raw, update, gate, after)
    return after


def _without_approximated_keys(
    attention: Any, gate: Tensor, kwargs: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The attention arguments with the keys of approximated tokens masked out (paper A.4)."""
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise InputError(
            "the masked back end does not decode with kv='drop'",
            "Use execution='sparse', which frees the cache",
        )
    batch, length = gate.shape
    mask = kwargs.get("attention_mask")
    places = torch.arange(length, device=gate.device)
    if mask is None:
        allowed = (places[:, None] >= places[None, :]).expand(batch, 1, length, length)
    else:
        allowed = (mask if mask.dtype == torch.bool else mask >= 0).expand(batch, 1, length, length)
    own = torch.eye(length, dtype=torch.bool, device=gate.device)  # no row may be empty
    allowed = (allowed & (gate.detach() > 0.5)[:, None, None, :]) | own
    if attention.config._attn_implementation == "eager":
        low = torch.finfo(dtype).min
        allowed = torch.zeros(allowed.shape, dtype=dtype, device=gate.device).masked_fill(~allowed, low)
    return {**kwargs, "attention_mask": allowed}
