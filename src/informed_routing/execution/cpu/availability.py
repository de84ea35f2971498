"""Which routed models the CPU engine can run here, and why not the others."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import InformedRoutingError
from ...progress import Progress
from .build import compiler, is_built, library

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
"""Families whose decoder is: embed, then pre-norm layers with gated FFNs, then a norm and a plain head."""


def unsupported(model: Any) -> str | None:
    """Why the engine cannot run this routed model; None when it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"model family {config.model_type!r} is not one of {', '.join(FAMILIES)}"
    if config.hidden_act not in ("silu", "swish", "gelu_pytorch_tanh"):
        return f"activation {config.hidden_act!r}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    attention = model.units[0].unit.module(model.decoder.layers[0])
    panel = int(library().ir_panel())
    for name, width, step in (
        ("head size", attention.head_dim, panel // 2),
        ("hidden size", config.hidden_size, panel),
    ):
        if width % step:
            return f"{name} {width} is no multiple of {step}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embeddings cover only part of a head"
    for layer in model.decoder.layers:
        for unit in (layer.attention_routing, layer.ffn_routing):
            for child in unit.unit.module(layer).children():
                plain = type(child) is nn.Linear or type(child).__name__.endswith("RMSNorm")
                if not plain and next(child.parameters(), None) is not None:
                    return f"a {type(child).__name__} in layer {unit.index // 2} (merge adapters first)"
    return None


def native_reason(model: Any, progress: Progress | None = None) -> str | None:
    """Why there is no native engine for a model here; None when there is. Compiles it if need be, saying so."""
    try:
        if progress is not None and compiler() and not is_built():
            progress.message("compiling the native engine for this machine (once)")
        return unsupported(model)
    except InformedRoutingError as error:
        return str(error)
