"""Static sub-layer dropping (LLM-Drop): attention or FFN units are deleted, with their norms, weights and cache.

A layer that lost a unit gets a subclass of its own class whose forward runs what is left. The KV cache keeps one place
for each layer, since transformers counts them that way; the place of a deleted attention stores nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import InputError
from ..models import calls
from ..models.runtime_classes import made_by
from ..models.units import Unit
from .remaining import UnitName, units_of
from .reshaped import mark_reshaped

Observer = Callable[[int, Unit, Tensor, Tensor], None]
"""Gets layer index, unit, and the residual stream [B, N, d] before and after the unit."""


class KeylessLayer(DynamicLayer):
    """The place of a deleted attention in a cache: stores nothing, and tells lengths as the layer `source` does.

    Positions and masks are made from the lengths that the first layers of a cache report.
    """

    supports_early_init = False
    is_compileable = True

    def __init__(self, cache: Cache, source: int) -> None:
        super().__init__()
        self.cache, self.source = cache, source

    @property
    def _with_keys(self) -> Any:
        """The layer `source` of the cache; None before it is created."""
        layers = self.cache.layers
        return layers[self.source] if self.source < len(layers) else None

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]  # a class attribute there
        return bool(getattr(self._with_keys, "is_sliding", False))

    def get_seq_length(self) -> int:
        return 0 if self._with_keys is None else self._with_keys.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length, 0) if self._with_keys is None else self._with_keys.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        pass


def _store_no_keys(cache: Cache, place: int, source: int) -> None:
    while len(cache.layers) <= place:  # a cache made without a config grows as layers report
        cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
    if not isinstance(cache.layers[place], KeylessLayer):
        cache.layers[place] = KeylessLayer(cache, source)


def _run_partial_layer(self: Any, hidden_states: Tensor, call: calls.Call) -> Tensor:
    for unit in self.kept_units:
        output = unit.run(self, unit.normed(self, hidden_states), call)
        after = hidden_states + unit.update(self, output)
        if self.unit_observer is not None:
            self.unit_observer(unit, hidden_states, after)
        hidden_states = after
    if call.cache is not None and self.keyless is not None:
        _store_no_keys(call.cache, *self.keyless)
    return hidden_states


@functools.cache
def partial_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a family's decoder layer that runs `kept_units` only."""
    names: dict[str, Any] = {
        "forward": calls.layer_forward(base, _run_partial_layer),
        "kept_units": (),
        "unit_observer": None,
        "keyless": None,
    }
    names |= {"__module__": __name__, **made_by(partial_layer_class, base)}
    return type(f"Partial{base.__name__}", (base,), names)


def drop_units(model: Any, dropped: Collection[UnitName]) -> None:
    """Delete units of a whole model, in place: no compute, weights or cache entries are left of them.

    Raises InputError for an unknown unit, or if no attention would be left: nothing could then tell the length of a
    KV cache.
    """
    layers, units = model.model.layers, units_of(model)
    names = {(index, unit.kind) for index in range(len(layers)) for unit in units}
    unknown = sorted(set(dropped) - names)
    if unknown:
        raise InputError(f"unit {unknown[0]} does not exist", f"Name a layer up to {len(layers) - 1} and its unit")
    with_keys = [index for index in range(len(layers)) if (index, "attention") not in dropped]
    if not with_keys:
        raise InputError("no attention would be left", "Keep at least one attention unit")
    for index, layer in enumerate(layers):
        kept = tuple(unit for unit in units if (index, unit.kind) not in dropped)
        if kept == units:
            continue
        for unit in units:
            if unit not in kept:
                _delete(layer, unit)
        layer.__class__ = partial_layer_class(type(layer))  # type: ignore[arg-type]
        layer.kept_units = kept
        if (index, "attention") in dropped:
            layer.keyless = (index, with_keys[0])
    if dropped:
        mark_reshaped(model)


def _delete(layer: nn.Module, unit: Unit) -> None:
    for part in ("", "_in_norm", "_out_norm", "_dropout"):
        name = getattr(unit.family, f"{unit.kind}{part}")
        if name is not None:
            delattr(layer, name)


@contextmanager
def running(
    layer: Any, units: tuple[Unit, ...], observer: Callable[[Unit, Tensor, Tensor], None] | None = None
) -> Iterator[None]:
    """Run only `units` of a whole layer, and show them to an observer, for the length of a `with` block."""
    base = type(layer)
    layer.__class__ = partial_layer_class(base)  # type: ignore[arg-type]
    layer.kept_units, layer.unit_observer = units, observer
    try:
        yield
    finally:
        del layer.kept_units, layer.unit_observer
        layer.__class__ = base


@contextmanager
def observing(model: Any, observer: Observer) -> Iterator[None]:
    """Show all units of a whole model to an observer, for the length of a `with` block."""
    with ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            stack.enter_context(running(layer, units_of(model), functools.partial(observer, index)))
        yield
