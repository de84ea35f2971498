"""Routing put into the layers of a live model: their units, and what these cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..config.folder import RoutingConfig
from ..config.parts import KINDS, ForecasterConfig, RouterConfig, SelectionConfig
from ..models.decoder import decoder_of, layers_name, layers_of, text_config
from ..models.discover import family_of
from ..routing.costs import unit_costs
from ..routing.routed_unit import RoutedUnit
from ..routing.state import RoutingState
from ..routing.stats import RoutingStats
from .layer import add_routing, add_units, renamed_decoder_class, routed_decoder_class
from .possible import check_selection, with_private


def units_of(decoder: Any) -> Iterator[RoutedUnit]:
    """All routed units in order: attention and ffn of layer 0, of layer 1, ..."""
    for layer in decoder.layers:
        yield layer.attention_routing
        yield layer.ffn_routing


def route_decoder(model: Any, config: RoutingConfig) -> RoutingState:
    """Give the layers of a dense model routed units, and layers and decoder their routed classes."""
    decoder = decoder_of(model)
    state = RoutingState(kv=config.kv)
    for place, layer in enumerate(layers_of(model)):
        private = config.private[place] if config.private else ()
        units = make_units(model, place, config.forecaster, config.router, config.selection, private)
        add_routing(layer, state, *units)
    decoder.routing_state = state
    make = routed_decoder_class if layers_name(decoder) == "layers" else renamed_decoder_class
    decoder.__class__ = make(type(decoder))  # type: ignore[arg-type]
    count_anew(decoder)
    return state


def make_units(
    model: Any,
    place: int,
    forecaster: ForecasterConfig,
    router: RouterConfig,
    selection: SelectionConfig,
    private: tuple[str, ...] = (),
) -> tuple[RoutedUnit, RoutedUnit]:
    """Fresh units (attention, ffn) for one layer, which keeps those that it has."""
    layer, width = layers_of(model)[place], text_config(model).hidden_size
    family, device = with_private(family_of(model, place), private), model.get_input_embeddings().weight.device
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
    costs = unit_costs(decoder.layers, units, decoder.config)
    decoder.routing_stats_counter = RoutingStats.empty(costs, [unit.kind for unit in units])
