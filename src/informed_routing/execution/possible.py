"""What of a selection can be done with a model: which units of it can be routed, and which layers static."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..config.folder import BaseModelReference, RoutingConfig
from ..config.parts import ForecasterConfig, RouterConfig, SelectionConfig, method_of
from ..config.types import describe
from ..errors import InputError
from ..models.decoder import decoder_of, layers_of, text_config
from ..models.discover import family_of
from ..models.families import Family
from ..models.private import LENGTH as PRIVATE_LENGTH
from ..models.private import private_matrices
from ..routing.state import KeyValues

Private = tuple[tuple[str, ...], ...]
"""By layer, names of matrices."""


def never_static(config: Any, layers: int) -> tuple[int, ...]:
    """Layers by whose keys transformers measures a cache: the first, and the first of each kind of attention."""
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    return tuple(sorted({0, *(list(kinds).index(kind) for kind in set(kinds[:layers]))}))


def with_private(family: Family, private: tuple[str, ...]) -> Family:
    """The row of a layer with what was measured of its attention, where that runs whole."""
    return family if family.in_parts else replace(family, private=private)


def measured_private(model: Any, selection: SelectionConfig) -> Private:
    """By layer, the matrices of its attention that only executed tokens need; empty where nothing is to be measured.

    That is so where all attentions are known or none is to be routed, on the meta device, and where a layer has none.
    """
    layers = layers_of(model)
    families = [family_of(model, place) for place in range(len(layers))]
    wanted = selection.units != "ffn" and selection.granularity != "layer" and not selection.static_layers
    if not wanted or all(family.in_parts for family in families) or model.device.type == "meta":
        return ()
    mixers = [getattr(layer, family.attention or "", None) for layer, family in zip(layers, families, strict=True)]
    own = [mixer for mixer in mixers if mixer is not None]
    if len(set(own)) < len(own):
        return ()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = private_matrices(decoder_of(model), mixers, text_of(model, PRIVATE_LENGTH))
    except Exception:  # whatever a base model's own code raises: the self-check says that it does not run
        return ()
    finally:
        model.train(training)
    pairs = list(zip(families, found, strict=True))
    known = all(family.in_parts or family.attention is None or names for family, names in pairs)
    return tuple(() if family.in_parts else names for family, names in pairs) if known else ()


def text_of(model: Any, length: int) -> Tensor:
    """Some ids [1, length] of a model's vocabulary, no two alike."""
    places = torch.arange(length, device=model.device)[None]
    return (places * 7919 + 5) % model.get_input_embeddings().weight.shape[0]


def possible_selection(model: Any, wanted: SelectionConfig, private: Private = (), *, given: bool) -> SelectionConfig:
    """What of a selection can be done with a model: FFNs alone where an attention is not known.

    `private` are the matrices of such attentions that were found to be skippable. Raises InputError where the selection
    is not what can be done, and for private matrices that the model has not; `given` says that both are of a folder.
    """
    layers, unknown, has_ffn = layers_of(model), None, False
    for place, layer in enumerate(layers):
        family = with_private(family_of(model, place), private[place] if private else ())
        _check_private(layer, place, family)
        has_ffn = has_ffn or family.ffn is not None
        if unknown is None and not (family.in_parts or family.private or family.attention is None):
            unknown = place
    if wanted.units == "ffn" and not has_ffn:
        raise InputError("its layers have no FFNs of their own", "Route attentions: selection.units = attention")
    if wanted.units == "ffn":
        return wanted
    whole = unknown is not None or any(private)
    if whole and (wanted.granularity == "layer" or wanted.static_layers or (unknown is not None and given)):
        raise _unknown_attention(model, unknown or 0)
    if unknown is not None and (wanted.units == "attention" or not has_ffn):
        raise _unknown_attention(model, unknown)
    if has_ffn and unknown is None:
        return wanted
    return wanted.model_copy(update={"units": "ffn" if has_ffn else "attention"})


def _unknown_attention(model: Any, place: int) -> InputError:
    name = type(getattr(layers_of(model)[place], family_of(model, place).attention or "", None)).__name__
    return InputError(
        f"the attention of layer {place} ({name}) cannot be routed: its code is not known",
        "Route FFNs alone: selection.units = ffn",
    )


def _check_private(layer: Any, place: int, family: Family) -> None:
    mixer = getattr(layer, family.attention or "", None)
    parts = {} if mixer is None else dict(mixer.named_modules())
    for name in family.private:
        if getattr(parts.get(name), "weight", None) is None:
            raise InputError(f"layer {place} has no matrix {name} that could be private", "Fit the model again")


def check_router(model: Any, router: RouterConfig) -> None:
    """Raises InputError for a router that reads the residual stream where only an FFN's own input is known."""
    if router.input == "normed":
        return
    for place, layer in enumerate(layers_of(model)):
        if family_of(model, place).in_place:
            raise InputError(
                f"router.input {router.input!r}: the stream of layer {place} ({type(layer).__name__}) is not known",
                "Use router.input = normed",
            )


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


def fresh_config(
    model: Any,
    base: BaseModelReference,
    forecaster: ForecasterConfig,
    router: RouterConfig,
    selection: SelectionConfig,
    kv: KeyValues,
    private: Private,
    version: str,
) -> RoutingConfig:
    """The configuration of untrained parts. Raises InputError when they do not go together."""
    try:
        return RoutingConfig(
            library_version=version,
            method=method_of(forecaster, selection),
            base_model=base,
            num_layers=len(layers_of(model)),
            hidden_size=text_config(model).hidden_size,
            forecaster=forecaster,
            router=router,
            selection=selection,
            private=private if selection.units != "ffn" else (),
            kv=kv,
        )
    except ValidationError as error:
        raise InputError(*describe(error)) from None
