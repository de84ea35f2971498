"""Which decoders the native engines know, whatever they run on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.calls import is_watched
from ..models.families import Family, NativeName, native_families
from ..models.head import PLAIN, logit_scaling

_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)


def is_gelu(family: Family, config: Any) -> bool:
    """Whether the FFN's activation is GELU by the tanh formula; if not, it is SiLU."""
    return getattr(config, family.activation) in _GELU


def activation_known(family: Family, config: Any) -> bool:
    """Whether the engines compute the FFN's activation."""
    return getattr(config, family.activation) in (*_SILU, *_GELU)


def unknown(model: Any, engine: NativeName) -> str | None:
    """What of a routed model a native engine does not know; None when it knows all of it."""
    config, family = model.config, model.units[0].unit.family
    if any(engine not in unit.unit.family.native for unit in model.units):
        return f"model family {config.model_type!r} is not one of {', '.join(native_families(engine))}, or like them"
    if not activation_known(family, config):
        return f"activation {getattr(config, family.activation)!r}"
    scaling = logit_scaling(family, config)
    if scaling != PLAIN and (engine != "cpu" or scaling.softcap is not None):
        return "logits that are scaled or capped"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embeddings cover only part of a head"
    if reason := _unknown_routing(model):
        return reason
    if getattr(config, "is_causal", True) is False:
        return "attention that is not causal"
    if reason := _unlike(model, family):
        return reason
    for place, layer in enumerate(model.decoder.layers):
        if layer.attention_routing.index != 2 * place:
            return "layers that were taken out or moved"
        for module in layer.modules():
            if is_watched(module):
                return f"hooks or another forward on a {type(module).__name__} of layer {place}"
        for unit in (layer.attention_routing, layer.ffn_routing):
            if not type(unit.unit.module(layer)).__module__.startswith("transformers.models."):
                return f"a {type(unit.unit.module(layer)).__name__} in layer {place} (merge adapters first)"
            for child in unit.unit.module(layer).children():
                plain = type(child) is nn.Linear or type(child).__name__.endswith("RMSNorm")
                if not plain and next(child.parameters(), None) is not None:
                    return f"a {type(child).__name__} in layer {unit.index // 2} (merge adapters first)"
    return None


def slices_of(model: Any) -> list[int]:
    """How many of its unit's neurons each slice has that approximated tokens get, in a model that is not `unknown`."""
    forms = [unit.forms()[1] for unit in model.units]
    return [len(form.slice) for form in forms if form is not None and form.slice is not None]


def _unlike(model: Any, family: Family) -> str | None:
    """Settings that differ between layers where the engines have one for all."""
    attentions = [layer.attention_routing.unit.module(layer) for layer in model.decoder.layers]
    for name in (family.attention_scale, "head_dim"):
        if len({getattr(attention, name) for attention in attentions}) > 1:
            return f"attentions of different {name}"
    epsilons: dict[bool, set[float]] = {True: set(), False: set()}
    for part in (model.decoder.layers, model.decoder.norm):
        for name, module in part.named_modules():
            if hasattr(module, "variance_epsilon"):
                epsilons[name.endswith(("q_norm", "k_norm"))].add(module.variance_epsilon)
    return "norms of different epsilons" if any(len(found) > 1 for found in epsilons.values()) else None


def _unknown_routing(model: Any) -> str | None:
    """What of the routing itself the engines do not know: they have plain routers that read their own unit's input."""
    router, selection = model.routing_config.router, model.routing_config.selection
    if any(unit.router is not None and unit.router.form() is None for unit in model.units):
        return f"{router.kind} routers"
    if router.input == "layer":
        return "routers that read the layer's input (router.input = layer)"
    if selection.granularity != "unit":
        return "one decision for a whole layer (selection.granularity = layer)"
    if selection.first_tokens or selection.first_layer or selection.every > 1:
        return "tokens or layers that always execute (selection)"
    return next((reason for unit in model.units if (reason := unit.unknown_to_engines())), None)
