"""The reference back end: both branches for every token, mixed by the gate. Sampled decisions train here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.calls import NOTHING, Call
from ..models.units import mixed, only_whole
from ..routing.routed_unit import RoutedUnit
from ..routing.state import RoutingState


def run(routed: RoutedUnit, state: RoutingState, layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """One routed unit on the residual stream [B, N, d]; returns the updated stream.

    With every gate at 1 the result equals the base model's bit for bit: `1 * y + 0 * f` is exactly `y`.
    """
    unit = routed.unit
    hidden = unit.stream(hidden)
    x = unit.normed(layer, hidden)
    if state.dense:
        raw = unit.run(layer, x, call)
        update = unit.update(layer, raw)
        after = unit.added(hidden, update)
        routed.observe(state, layer, hidden, x, raw, update, None, after)
        return after
    features = routed.features(hidden, x)
    gate = routed.decide(state, hidden, features)
    if routed.always_executes:
        return unit.added(hidden, unit.update(layer, unit.run(layer, x, call)))
    if routed.kind == "attention" and state.kv == "drop":
        call = _without_approximated_keys(routed, state, layer, gate, call, hidden.dtype)
    raw = unit.run(layer, x, call)
    update = unit.update(layer, raw)
    forecast = routed.forecast(layer, features, x)
    after = unit.mixed(hidden, gate, update, forecast)
    routed.observe(state, layer, hidden, x, raw, update, gate, after)
    return after


def run_joined(
    attention: RoutedUnit,
    ffn: RoutedUnit,
    state: RoutingState,
    layer: nn.Module,
    hidden: Tensor,
    call: Call,
) -> Tensor:
    """A layer whose units share one decision: the whole layer for every token, mixed once with the stream [B, N, d].

    The same forward as unit by unit; but the router's gradient asks what the whole layer would have done, its FFN
    reading what its attention wrote (D-LLM).
    """
    x = attention.unit.normed(layer, hidden)
    gate = attention.decide(state, hidden, attention.features(hidden, x))
    ffn.decide(state, hidden, hidden)  # the same gate
    if state.kv == "drop":
        call = _without_approximated_keys(attention, state, layer, gate, call, hidden.dtype)
    between = hidden + attention.unit.update(layer, attention.unit.run(layer, x, call))
    written = ffn.unit.run(layer, ffn.unit.normed(layer, between), NOTHING)
    return mixed(gate, between + ffn.unit.update(layer, written), hidden)


def _without_approximated_keys(
    routed: RoutedUnit, state: RoutingState, layer: nn.Module, gate: Tensor, call: Call, dtype: torch.dtype
) -> Call:
    """The attention's call with the keys of approximated tokens masked out (paper A.4).

    The mask has no gradient: routers learn from what their own token's update does, not from who attends to it.
    """
    attention: Any = routed.unit.module(layer)
    if reason := only_whole(routed.unit.family, attention, call):
        raise InputError(f"kv='drop' does not go with {reason}", "Use kv='keep', or attn_implementation='sdpa'")
    if call.cache is not None and call.cache.get_seq_length(attention.layer_idx) > 0:
        raise InputError(
            "the masked back end does not decode with kv='drop'",
            "Use execution='sparse', which frees the cache",
        )
    batch, length = gate.shape
    mask = call.mask
    places = torch.arange(length, device=gate.device)
    if mask is None:
        allowed = (places[:, None] >= places[None, :]).expand(batch, 1, length, length)
    else:
        allowed = (mask if mask.dtype == torch.bool else mask >= 0).expand(batch, 1, length, length)
    own = torch.eye(length, dtype=torch.bool, device=gate.device)  # no row may be empty
    executed = gate.detach() > 0.5
    allowed = allowed & executed[:, None, None, :]
    state.forward.keys_read[routed.index] = (allowed & executed[:, None, :, None]).sum()
    allowed = allowed | own
    if attention.config._attn_implementation == "eager":
        low = torch.finfo(dtype).min
        allowed = torch.zeros(allowed.shape, dtype=dtype, device=gate.device).masked_fill(~allowed, low)
    return call.with_mask(allowed, type(attention).forward)
