"""What of a model can be routed, without its weights: units, what can be skipped, and which engine knows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..config.parts import KINDS, ForecasterConfig, RouterConfig, SelectionConfig, UnitKind
from ..models.decoder import layers_of, text_config
from ..models.discover import family_of
from ..models.families import FAMILIES, Family
from ..models.in_place import base_of
from ..routing.costs import UnitCost, unit_costs
from ..routing.routed_unit import RoutedUnit
from .possible import measured_private, possible_selection, with_private


@dataclass
class UnitFound:
    """Units of the same kind, class and cost, in some layers."""

    kind: UnitKind
    path: str
    """Where it is in its layer."""
    module: str
    """Its class."""
    layers: list[int]
    form: str
    """What is added to the residual stream for it."""
    routed: bool
    needs_weights: bool
    """Whether only a model with weights can tell what of it is skippable: its code is not known."""
    macs: float
    """Multiply-accumulates of one layer's unit for one token of the context asked for."""
    skippable: float
    """Share of them that an approximated token does not need, its forecast not counted."""
    neurons: int | None
    """How many neurons slices are taken of (fallback slim); None where there are none."""


@dataclass
class Inspection:
    """What of a causal LM can be routed."""

    model_type: str
    source: str
    """`table`, or `code` where the family is not in it."""
    layers: int
    hidden_size: int
    context: int
    units: list[UnitFound]
    macs: float
    """Of the decoder body for one token that attends to `context` keys."""
    skippable: float
    """Share of the body that tokens could skip if every routed unit were approximated, forecasts not counted."""
    engines: tuple[str, ...]
    """Native engines that know the architecture: what one needs besides is said when a routed model is loaded."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect(model: Any, context: int = 512) -> Inspection:
    """Look at a causal LM, which may be on the meta device. Raises InputError where its code is not understood."""
    family_of(model)  # first of all: it says what is not understood
    layers, config = layers_of(model), text_config(model)
    families = [family_of(model, place) for place in range(len(layers))]
    private = measured_private(model, SelectionConfig())
    families = [with_private(family, private[place] if private else ()) for place, family in enumerate(families)]
    unknown = any(not (family.in_parts or family.private or family.attention is None) for family in families)
    on_meta = unknown and model.device.type == "meta"
    if on_meta:  # what is private is measured
        selection = SelectionConfig(units="ffn")
    else:
        selection = possible_selection(model, SelectionConfig(), private, given=False)
    units = _units(layers, families, config.hidden_size, selection)
    costs = unit_costs(layers, units, config)
    found: dict[tuple[Any, ...], UnitFound] = {}
    for unit, cost in zip(units, costs, strict=True):
        one = _found(layers[unit.index // 2], families[unit.index // 2], unit, cost, context, on_meta)
        alike = (one.kind, one.path, one.module, one.form, one.routed, one.macs, one.neurons)
        found.setdefault(alike, one).layers.append(unit.index // 2)
    body = sum(cost.dense(context) for cost in costs)
    skipped = sum(cost.dense(context) - cost.kept(context) for u, cost in zip(units, costs, strict=True) if u.is_routed)
    common = set.intersection(*(set(family.native) for family in families))
    return Inspection(
        model_type=model.config.model_type,
        source="table" if model.config.model_type in FAMILIES else "code",
        layers=len(layers),
        hidden_size=config.hidden_size,
        context=context,
        units=sorted(found.values(), key=lambda one: (one.layers[0], KINDS.index(one.kind))),
        macs=body,
        skippable=skipped / body,
        engines=tuple(sorted(common)),
    )


def _units(
    layers: Sequence[nn.Module], families: Sequence[Family], width: int, selection: SelectionConfig
) -> list[RoutedUnit]:
    """The units of a model with routers of no weight to speak of, and updates of zero."""
    nothing, router = ForecasterConfig(fallback="zero"), RouterConfig(kind="linear")
    with torch.device("meta"):
        return [
            RoutedUnit(2 * place + j, kind, family, layer, width, nothing, router, selection)
            for place, (layer, family) in enumerate(zip(layers, families, strict=True))
            for j, kind in enumerate(KINDS)
        ]


def _found(
    layer: nn.Module, family: Family, unit: RoutedUnit, cost: UnitCost, context: int, on_meta: bool
) -> UnitFound:
    path = getattr(family, unit.kind) or "-"
    if unit.kind == "ffn" and family.ffn_beside is not None:
        path = f"{path} + {family.ffn_beside}"
    dense = cost.dense(context)
    return UnitFound(
        kind=unit.kind,
        path=path,
        module=_class_of(unit.unit.module_of(layer, unit.kind)),
        layers=[],
        form=_form(family, unit.kind),
        routed=unit.is_routed,
        needs_weights=unit.kind == "attention" and not unit.is_routed and family.attention is not None and on_meta,
        macs=dense,
        skippable=(dense - cost.kept(context)) / dense if unit.is_routed and dense else 0.0,
        neurons=unit.unit.neurons(layer),
    )


def _class_of(module: nn.Module | None) -> str:
    return "-" if module is None else base_of(type(module)).__name__


def _form(family: Family, kind: UnitKind) -> str:
    """`scale * out_norm(unit(in_norm(h)))` with the names of the parts."""
    if family.in_place:
        return f"{family.ffn} where its layer calls it" if kind == "ffn" and family.ffn else "all else of the layer"
    read, written = (getattr(family, f"{kind}_{part}") for part in ("in_norm", "out_norm"))
    inner = f"{read}(h)" if read else "h"
    text = f"{getattr(family, kind)}({inner})"
    if kind == "ffn" and family.ffn_beside is not None:
        text = f"({text} + {family.ffn_beside}({inner}))"
    text = f"{written}({text})" if written else text
    return f"{family.residual_scale} * {text}" if family.residual_scale else text
