"""Layers whose own forward is left alone: their units decide where they are called (`models/in_place.py`)."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..models import calls
from ..models.in_place import base_of, forward_of_ffn, outputs_of
from ..models.runtime_classes import made_by
from ..routing.routed_unit import RoutedUnit
from ..routing.state import RoutingState
from . import masked, sparse


@functools.cache
def in_place_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of a decoder layer that says which layer runs, and what of it always executes."""
    base_forward = base.forward

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: RoutingState = self.routing_state
        state.forward.layer = self
        for routed in (self.attention_routing, self.ffn_routing):
            if routed.always_executes and not state.dense and state.forward.contexts is not None:
                rows = state.forward.contexts.unsqueeze(-1)
                routed.decide(state, rows, rows)
        output = base_forward(self, *args, **kwargs)
        state.forward.layer = None
        return output

    names = {"forward": forward, "__module__": __name__, **made_by(in_place_layer_class, base)}
    return type(f"Routed{base.__name__}", (base,), names)


@functools.cache
def routed_ffn_class(base: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of an FFN."""
    base_forward: Any = base.forward

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: RoutingState = self.routing_state
        if state.dense and state.observer is None:
            return base_forward(self, *args, **kwargs)
        given = calls.bound(base_forward, args, kwargs)
        stream = given.pop(calls.first_parameter(base_forward), None)
        if not isinstance(stream, Tensor):
            raise InputError(f"a routed {base.__name__} was called without its input", "Call the whole model")
        output = _routed(state, stream, calls.Call(given), base.__name__)
        count = outputs_of(forward_of_ffn(self))
        # What else it gives back is of tokens that reached it: of no use where some do not (`_check_records`).
        return (output, *(None,) * (count - 1)) if count else output

    names = {"forward": forward, "__module__": __name__, **made_by(routed_ffn_class, base)}
    return type(f"Routed{base.__name__}", (base,), names)


@functools.cache
def routed_mixer_class(base: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of a mixer of tokens that has private matrices."""
    base_forward: Any = base.forward

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: RoutingState = self.routing_state
        if state.dense and state.observer is None:
            return base_forward(self, *args, **kwargs)
        given = calls.bound(base_forward, args, kwargs)
        stream, layer = given.pop(calls.first_parameter(base_forward), None), state.forward.layer
        if layer is None or not isinstance(stream, Tensor) or stream.dim() != 3:
            raise InputError(f"a routed {base.__name__} was called outside its layer", "Call the whole model")
        call = calls.Call(given)
        run = sparse.run if state.skips(layer.training) else masked.run
        output = _weighted(layer.attention_routing, state, run(layer.attention_routing, state, layer, stream, call))
        return (output, *call.besides[0]) if call.besides else output

    names = {"forward": forward, "__module__": __name__, **made_by(routed_mixer_class, base)}
    return type(f"Routed{base.__name__}", (base,), names)


def _routed(state: RoutingState, given: Tensor, call: calls.Call, name: str) -> Tensor:
    """An FFN's output for its input, each [B, N, d] or a list of rows [B * N, d]."""
    layer, contexts = state.forward.layer, state.forward.contexts
    if layer is None or contexts is None:
        raise InputError(f"a routed {name} was called outside its layer", "Call the whole model, not a part of it")
    if given.shape[:-1].numel() != contexts.numel():
        raise InputError(f"a routed {name} was not called with one row for each token", "Use sparsity 0")
    routed: RoutedUnit = layer.ffn_routing
    hidden = given.reshape(*contexts.shape, given.shape[-1])
    run = sparse.run if state.skips(layer.training) else masked.run
    output = _weighted(routed, state, run(routed, state, layer, hidden, call))
    return output.view(*given.shape[:-1], output.shape[-1])


def _weighted(routed: RoutedUnit, state: RoutingState, output: Tensor) -> Tensor:
    """A unit's output [B, N, d], multiplied by what a ranking router gives it, if there is one (MoD)."""
    weight = state.forward.weights.get(routed.index)
    return output if weight is None else weight.unsqueeze(-1).to(output.dtype) * output


def add_in_place(layer: Any, state: RoutingState) -> None:
    """Make a live layer that has its units, and their modules, routed ones."""
    layer.__class__ = in_place_layer_class(type(layer))  # type: ignore[arg-type]
    for unit, make in ((layer.attention_routing, routed_mixer_class), (layer.ffn_routing, routed_ffn_class)):
        name = getattr(unit.unit.family, unit.kind)
        if name is None or unit.always_executes:
            continue
        module = getattr(layer, name)
        calls.check_own_forwards((module,))
        if base_of(type(module)) is not type(module):
            raise InputError(f"a {type(module).__name__} is in more than one layer", "Use a model without shared ones")
        module.routing_state = state
        module.__class__ = make(type(module))  # type: ignore[arg-type]
