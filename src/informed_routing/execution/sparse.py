"""The back end that skips: executed tokens are gathered, computed and written back; the rest cost a forecast.

Keys and values are computed and cached for all tokens, so that later tokens can attend to approximated ones; with
kv='drop' only executed tokens leave any. Works on CPU and GPU; data-dependent counts are read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.calls import Call
from ..models.families import Family
from ..models.units import attend, attend_causal, keys_values, only_whole, queries
from ..routing.routed_unit import RoutedUnit
from ..routing.state import RoutingState
from . import masked, worth
from .cache import ExecutedKeysLayer
from .private_rows import rows

QUERY_BLOCK = 256
"""Queries in one attention call on a CPU: few enough to skip keys that none of them sees."""

Rope = tuple[Tensor, Tensor] | None


def run(routed: RoutedUnit, state: RoutingState, layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """One routed unit on the residual stream [B, N, d]; equals `masked.run` to rounding for the same gate.

    Calls that only the base model's own attention understands are done whole: with kv='drop' an InputError.
    """
    if state.dense or state.observer is not None:
        return masked.run(routed, state, layer, hidden, call)
    if routed.always_executes:
        return masked.run(routed, state, layer, hidden, call)
    family = routed.unit.family
    if (
        routed.kind == "attention"
        and not family.private
        and (reason := only_whole(family, routed.unit.module(layer), call))
    ):
        if state.kv == "drop":
            raise InputError(f"kv='drop' does not go with {reason}", "Use kv='keep', or attn_implementation='sdpa'")
        return masked.run(routed, state, layer, hidden, call)
    unit = routed.unit
    hidden = unit.stream(hidden)
    x = unit.normed(layer, hidden)
    chooses = state.rounds and routed.router is not None and not routed.joins
    if chooses and not worth.pays(_skip, routed, state, layer, hidden, x, call):
        return worth.whole(routed, state, layer, hidden, x, call)
    features = routed.features(hidden, x)
    gate = routed.decide(state, hidden, features)
    if chooses:
        worth.saw(routed, state, gate)
    return _skip(routed, state, layer, hidden, x, features, gate, call)


def _skip(
    routed: RoutedUnit,
    state: RoutingState,
    layer: nn.Module,
    hidden: Tensor,
    x: Tensor,
    features: Tensor,
    gate: Tensor,
    call: Call,
) -> Tensor:
    """The updated stream [B, N, d] by a gate bool [B, N]; the unit reads x, its forecaster features."""
    unit, family = routed.unit, routed.unit.family
    flat = gate.reshape(-1)
    executed = flat.nonzero().squeeze(1)
    count, total = executed.numel(), flat.numel()
    if routed.kind == "attention":
        if count == total and state.kv == "keep":
            return unit.added(hidden, unit.update(layer, unit.run(layer, x, call)))
        if family.private:
            with rows(state, executed, total):
                output = _rows(unit.run(layer, x, call), executed)
        elif state.kv == "drop":
            output, state.forward.keys_read[routed.index] = _drop_attention(routed, layer, x, gate, executed, call)
        else:
            output = _keep_attention(routed, layer, x, gate, executed, call)
    elif count == total:
        return unit.added(hidden, unit.update(layer, unit.run(layer, x, call)))
    elif count:
        output = unit.run(layer, _rows(x, executed), call.rows(executed, total))
    if not count:
        return unit.added(hidden, routed.forecast(layer, features, x))
    update = unit.update(layer, output).reshape(1, count, -1)
    some = unit.added(_rows(hidden, executed), update)[0]
    result = some.new_empty(total, some.shape[-1])  # what a unit gives back may be of another type than what it reads
    result.index_copy_(0, executed, some)
    if count < total:
        approximated = (~flat).nonzero().squeeze(1)
        forecast = routed.forecast(layer, _rows(features, approximated), _rows(x, approximated))
        others = unit.added(_rows(hidden, approximated), forecast)[0]
        result.index_copy_(0, approximated, others.to(some.dtype))
    return result.view_as(hidden)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, N, d] by flat index, as [1, n, d]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, index).unsqueeze(0)


def _keep_attention(
    routed: RoutedUnit, layer: nn.Module, x: Tensor, gate: Tensor, executed: Tensor, call: Call
) -> Tensor:
    """Outputs [1, n, d] of the executed tokens in flat order, with keys and values of all tokens."""
    family, attention = routed.unit.family, routed.unit.module(layer)
    rope, cache, mask = call.rope, call.cache, call.mask
    keys, values = keys_values(family, attention, x, rope)
    batch, length = gate.shape
    past = 0
    if cache is not None:
        if mask is None and length > 1:
            past = int(cache.get_seq_length(attention.layer_idx))
        keys, values = cache.update(keys, values, attention.layer_idx)
    if not executed.numel():
        return x
    if length == 1:  # decode: only the sequences that execute
        if batch > 1:
            x, keys, values = x[executed], keys[executed], values[executed]
            mask = mask[executed] if mask is not None and mask.shape[0] > 1 else mask
            rope = _take_batch(rope, executed)
        return attend(family, attention, queries(family, attention, x, rope), keys, values, mask).transpose(0, 1)
    # The place of the call's first token among the keys, which matters without a mask: behind the call's own tokens a
    # static cache has room for later ones, and a sliding one has dropped early ones.
    first = min(keys.shape[-2] - length, past)
    if batch == 1:
        q = queries(family, attention, x[:, executed], _take(rope, executed))
        rows = None if mask is None else mask[:, :, executed]
        return _attend(family, attention, q, keys, values, rows, executed[None] + first)
    places, filled = _ragged(gate)
    spread = places.unsqueeze(-1)
    q = queries(family, attention, x.gather(1, spread.expand(-1, -1, x.shape[-1])), _take_ragged(rope, places))
    rows = None if mask is None else _mask_ragged(mask, places)
    return _attend(family, attention, q, keys, values, rows, places + first)[filled].unsqueeze(0)


def _attend(
    family: Family, attention: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, last: Tensor
) -> Tensor:
    """Outputs [B, Q, d]. Without mask rows the base model relies on causality: queries see keys up to `last` [B, Q]."""
    if mask is not None:
        return attend(family, attention, q, keys, values, mask)
    # On a GPU every further block would cost a wait for the host.
    block = QUERY_BLOCK if q.device.type == "cpu" else q.shape[2]
    return attend_causal(family, attention, q, keys, values, last, block)


def _drop_attention(
    routed: RoutedUnit, layer: nn.Module, x: Tensor, gate: Tensor, executed: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """As `_keep_attention`, but approximated tokens leave no key and no value. Also counts the keys attended to."""
    family, attention = routed.unit.family, routed.unit.module(layer)
    batch, length = gate.shape
    cache = call.cache
    store = cache.layers[attention.layer_idx] if cache is not None else ExecutedKeysLayer()
    start = store.seen
    store.seen += length
    if not executed.numel():
        return x, torch.zeros((), dtype=torch.long, device=x.device)
    places, filled = _ragged(gate)
    rope = _take_ragged(call.rope, places)
    rows = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    keys, values = keys_values(family, attention, rows, rope)
    stored_at = torch.where(filled, places + start, -1)
    keys, values, stored_at = store.append(keys, values, stored_at)
    mask = call.mask
    if mask is None:
        allowed = stored_at[:, None, None, :] <= (places + start)[:, None, :, None]
    else:
        full = _mask_ragged(mask, places)
        picked = stored_at.clamp(min=0)[:, None, None, :].expand(-1, -1, places.shape[1], -1)
        allowed = full.expand(batch, -1, -1, -1).gather(3, picked)
        allowed = allowed if allowed.dtype == torch.bool else allowed >= 0
    allowed = allowed & (stored_at >= 0)[:, None, None, :]
    read = (allowed & filled[:, None, :, None]).sum()
    # Filler queries are thrown away below; they only must not be empty rows.
    allowed = allowed | ~filled[:, None, :, None]
    q = queries(family, attention, rows, rope)
    return attend(family, attention, q, keys, values, allowed)[filled].unsqueeze(0), read


# ---------------------------------------------------------------------------------------------------------
# Selections
# ---------------------------------------------------------------------------------------------------------


def _ragged(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Places [B, Q] of the executed tokens of each sequence, in order, and which of them are real."""
    counts = gate.sum(1)
    widest = int(counts.max())
    places = gate.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :widest]
    return places, torch.arange(widest, device=gate.device) < counts[:, None]


def _take(rope: Rope, places: Tensor) -> Rope:
    return None if rope is None else (rope[0][:, places], rope[1][:, places])


def _take_batch(rope: Rope, rows: Tensor) -> Rope:
    if rope is None or rope[0].shape[0] == 1:
        return rope
    return rope[0][rows], rope[1][rows]


def _take_ragged(rope: Rope, places: Tensor) -> Rope:
    if rope is None:
        return None
    cos, sin = (part.expand(places.shape[0], -1, -1) for part in rope)
    index = places.unsqueeze(-1).expand(-1, -1, cos.shape[-1])
    return cos.gather(1, index), sin.gather(1, index)


def _mask_ragged(mask: Tensor, places: Tensor) -> Tensor:
    """Mask rows [B, 1, Q, K] of queries whose places [B, Q] differ between sequences."""
    mask = mask.expand(places.shape[0], -1, -1, -1)
    return mask.gather(2, places[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))
