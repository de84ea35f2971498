"""Routing put into the layers of a live model: their units, what these cost, and which layers may be static."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..config.folder import RoutingConfig
from ..config.parts import KINDS, ForecasterConfig, RouterConfig, SelectionConfig
from ..errors import InputError
from ..models.discover import family_of
from ..routing.costs import unit_costs
from ..routing.routed_unit import RoutedUnit
from ..routing.state import RoutingState
from ..routing.stats import RoutingStats
from .layer import add_routing, add_units, routed_decoder_class


def units_of(decoder: Any) -> Iterator[RoutedUnit]:
    """All routed units in order: attention and ffn of layer 0, of layer 1, ..."""
    for layer in decoder.layers:
        yield layer.attention_routing
        yield layer.ffn_routing


def route_decoder(model: Any, config: RoutingConfig) -> RoutingState:
    """Give the layers of a dense model routed units, and layers and decoder their routed classes."""
    decoder = model.model
    state = RoutingState(kv=config.kv)
    for place, layer in enumerate(decoder.layers):
        units = make_units(model, place, config.forecaster, config.router, config.selection)
        add_routing(layer, state, *units)
    decoder.routing_state = state
    count_anew(decoder)
    decoder.__class__ = routed_decoder_class(type(decoder))  # type: ignore[arg-type]
    return state


def make_units(
    model: Any, place: int, forecaster: ForecasterConfig, router: RouterConfig, selection: SelectionConfig
) -> tuple[RoutedUnit, RoutedUnit]:
    """Fresh units (attention, ffn) for one layer, which keeps those that it has."""
    layer, width = model.model.layers[place], model.config.hidden_size
    family, device = family_of(model, place), model.get_input_embeddings().weight.device
    attention, ffn = (
        RoutedUnit(2 * place + j, kind, family, layer, width, forecaster, router, selection).to(device)
        for j, kind in enumerate(KINDS)
    )
    return attention, ffn


def make_static(model: Any, places: Sequence[int]) -> None:
    """Make more layers of a routed model static, with fresh forecasters. Raises InputError for those that cannot be."""
    config: RoutingConfig = model.routing_config
    given = (*config.selection.static_layers, *places)
    selection = SelectionConfig.model_validate({**config.selection.model_dump(), "static_layers": given})
    check_selection(model.config, len(model.decoder.layers), selection)
    for place in places:
        units = make_units(model, place, config.forecaster, config.router, selection)
        add_units(model.decoder.layers[place], *units)
    model.routing_config = config.model_copy(update={"selection": selection})
    count_anew(model.decoder)


def count_anew(decoder: Any) -> None:
    """Costs and counts of the units that the decoder has now."""
    units = list(units_of(decoder))
    costs = unit_costs(decoder.layers, units)
    decoder.routing_stats_counter = RoutingStats.empty(costs, [unit.kind for unit in units])


def never_static(config: Any, layers: int) -> tuple[int, ...]:
    """Layers by whose keys transformers measures a cache: the first, and the first of each kind of attention."""
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    return tuple(sorted({0, *(list(kinds).index(kind) for kind in set(kinds[:layers]))}))


def possible_selection(model: Any, wanted: SelectionConfig, given: bool) -> SelectionConfig:
    """What of a selection can be done with a model: FFNs alone where the code of an attention is not known.

    Raises InputError where that is not what is asked for; `given` says that the selection is that of a folder.
    """
    places = range(len(model.model.layers))
    unknown = next((place for place in places if not family_of(model, place).in_parts), None)
    if unknown is None or wanted.units == "ffn":
        return wanted
    layer = model.model.layers[unknown]
    name = type(getattr(layer, family_of(model, unknown).attention)).__name__
    if given or wanted.units == "attention" or wanted.granularity == "layer" or wanted.static_layers:
        raise InputError(
            f"the attention of layer {unknown} ({name}) cannot be routed: its code is not known",
            "Route FFNs alone: selection.units = ffn",
        )
    return wanted.model_copy(update={"units": "ffn"})


def check_selection(config: Any, layers: int, selection: SelectionConfig) -> None:
    """Raises InputError for layers to route or to approximate always that a model has not, or that cannot be."""
    if selection.first_layer >= layers:
        raise InputError(
            f"selection.first_layer {selection.first_layer} leaves none of {layers} layers to route",
            "Choose a lower one",
        )
    needed = never_static(config, layers)
    for place in selection.static_layers:
        if place in needed:
            raise InputError(
                f"layer {place} cannot be static: it is the first of its kind, by whose keys a cache is measured",
                f"Choose others than {', '.join(map(str, needed))}",
            )
