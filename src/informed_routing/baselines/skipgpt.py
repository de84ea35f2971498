"""SkipGPT's released routers (arXiv 2506.04179): linear, two for each layer, reading the raw stream at layer entry."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..models.units import UnitKind
from ..routed_model import RoutedModelForCausalLM
from ..routing.margins import APPROXIMATE, EXECUTE

__all__ = ["load_released"]

_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?router_(attention|mlp)\.(?:.*\.)?(weight|bias)$")
_KINDS: dict[str, UnitKind] = {"attention": "attention", "mlp": "ffn"}
_RELEASED_EXECUTE, _RELEASED_SKIP = 0, 1


def load_released(model: RoutedModelForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    """Copy a released checkpoint into a model's routers.

    `tensors` are `...layers.L.router_attention...weight` [2, d] and `...bias` [2], and `router_mlp` alike. The
    release executes by class 0, we by class 1: rows are swapped. `model` has linear routers with
    `router.input = layer` (recipe skipgpt-faithful). Raises InputError for routers of another kind, for names or shapes
    that do not fit, and for layers that are missing or too many; then no router has changed.
    """
    config = model.routing_config.router
    if config.kind != "linear" or config.input != "layer":
        raise InputError(
            f"the model has {config.kind} routers with input {config.input}, the release linear ones with input layer",
            "Attach it with the parts of the recipe skipgpt-faithful",
        )
    found = {_place(name): tensor for name, tensor in tensors.items()}
    width = model.routing_config.hidden_size
    shapes = {"weight": (2, width), "bias": (2,)}
    wanted = {
        (unit.index // 2, unit.kind, part): getattr(unit.router.outer, part)
        for unit in model.units
        if unit.router is not None
        for part in shapes
    }
    if odd := wanted.keys() ^ found.keys():
        layer, kind, part = min(odd)
        problem = "lacks" if min(odd) in wanted else "has, unlike this model,"
        raise InputError(f"the checkpoint {problem} the {part} of layer {layer} {kind}", "Give routers of this model")
    for (layer, kind, part), tensor in found.items():
        if tuple(tensor.shape) != shapes[part]:
            raise InputError(
                f"the {part} of layer {layer} {kind} has shape {tuple(tensor.shape)}, not {shapes[part]}",
                "Give routers of this model",
            )
    with torch.no_grad():
        for place, parameter in wanted.items():
            parameter[EXECUTE].copy_(found[place][_RELEASED_EXECUTE])
            parameter[APPROXIMATE].copy_(found[place][_RELEASED_SKIP])


def _place(name: str) -> tuple[int, UnitKind, str]:
    """(layer, kind, weight or bias) of a released tensor."""
    match = _NAME.search(name)
    if match is None:
        raise InputError(f"{name} is no tensor of a released SkipGPT router", "Give the file router.pth, converted")
    layer, kind, part = match.groups()
    return int(layer), _KINDS[kind], part
