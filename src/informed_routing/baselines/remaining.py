"""What is left of a pruned model, read from the model: the units that it lost, and the width that it was sliced to."""

from __future__ import annotations

from typing import Any

from ..config.parts import UnitKind
from ..models.discover import listed_family_of
from ..models.units import Unit

UnitName = tuple[int, UnitKind]
"""A unit of a model: layer index and kind."""


def units_of(model: Any) -> tuple[Unit, Unit]:
    """Attention and FFN of the model's family."""
    family = listed_family_of(model)
    return Unit("attention", family), Unit("ffn", family)


def dropped_units(model: Any) -> list[UnitName]:
    """The units that were dropped from a model, in order."""
    units = units_of(model)
    return [
        (index, unit.kind)
        for index, layer in enumerate(model.model.layers)
        for unit in units
        if unit not in getattr(layer, "kept_units", units)
    ]


def sliced_width(model: Any) -> int | None:
    """The width that a model was sliced to; None if it was not."""
    sliced = hasattr(
        getattr(model.model, "norm", None), "full_width"
    )  # only a sliced norm knows another width than its own
    return model.config.hidden_size if sliced else None
