"""Routed decoder layers and decoders: the base model's classes with another forward.

Changing the class of a live layer (rather than its `forward` attribute) keeps gradient checkpointing, output
recording and `isinstance` working, because transformers hangs these on the class.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import InputError
from ..routing.budget import RoutingStats
from ..routing.routed_unit import RoutedUnit, RoutingState
from . import masked, sparse
from .cache import keep_executed_only


def _routed_layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args:
        raise TypeError("routed decoder layers take keyword arguments besides hidden_states")
    state: RoutingState = self.routing_state
    run = sparse.run if state.skips(self.training) else masked.run
    hidden_states = run(self.attention_routing, state, self, hidden_states, kwargs)
    return run(self.ffn_routing, state, self, hidden_states, {})


@functools.cache
def routed_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of a family's decoder layer."""
    return type(f"Routed{base.__name__}", (base,), {"forward": _routed_layer_forward, "__module__": __name__})


@functools.cache
def routed_decoder_class(base: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of a family's decoder: notes padding before a forward and counts after it."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens, mask, cache = _describe(args, kwargs)
        state: RoutingState = self.routing_state
        state.gates, state.margins = {}, {}
        contexts = _contexts(tokens, mask, cache)
        state.valid = None if mask is None or mask.dim() != 2 or bool((contexts > 0).all()) else contexts > 0
        if state.kv == "drop" and not state.dense and state.skips(self.training):
            kwargs = _with_dropping_cache(self, kwargs, cache)
        output = base.forward(self, *args, **kwargs)
        if not self.training and state.observer is None:
            stats: RoutingStats = self.routing_stats_counter
            stats.add(state, contexts)
        return output

    # transformers keeps what a class can record (hidden states) under the class's printed name: keep that name.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(f"Routed{base.__name__}", (base,), {"forward": forward, **names})


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
    """Input tensor, attention mask and cache of a decoder call, positional or not."""
    named = dict(zip(("input_ids", "attention_mask", "position_ids", "past_key_values"), args, strict=False))
    named.update(kwargs)
    tokens = named.get("input_ids")
    tokens = named.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise InputError("the model was called without input_ids or inputs_embeds", "Give one of them")
    mask = named.get("attention_mask")
    return tokens, mask if isinstance(mask, Tensor) else None, named.get("past_key_values")


def _contexts(tokens: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """Keys visible to each token [B, N], itself included; 0 for padding."""
    batch, length = tokens.shape[:2]
    if mask is not None and mask.dim() == 2:
        counts = mask.long().cumsum(1) * mask.long()
        return counts[:, -length:]
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(length, device=tokens.device) + 1 + int(past)).expand(batch, length)


def _with_dropping_cache(decoder: Any, kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    use_cache = kwargs.get("use_cache")
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    if cache is None:
        if not use_cache:
            return kwargs
        cache = DynamicCache(config=decoder.config)
        kwargs = {**kwargs, "past_key_values": cache}
    if cache.get_seq_length() == 0:
        if not isinstance(cache, DynamicCache):
            raise InputError(f"kv='drop' cannot use a {type(cache).__name__}", "Use the default dynamic cache")
        keep_executed_only(cache, decoder.config.num_hidden_layers)
    return kwargs


def add_routing(layer: Any, state: RoutingState, attention: RoutedUnit, ffn: RoutedUnit) -> None:
    """Make a live decoder layer a routed one."""
    layer.attention_routing = attention
    layer.ffn_routing = ffn
    layer.routing_state = state
    layer.__class__ = routed_layer_class(type(layer))  # type: ignore[arg-type]
