"""Which routed models the GPU engine can run here, and why not the others."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ...progress import Progress
from ..cpu.availability import FAMILIES

OLDEST = (8, 0)
"""Compute capability: bfloat16 tensor cores and asynchronous copies."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(model: Any) -> str | None:
    """Why the engine cannot run this routed model; None when it can."""
    config, device = model.config, model.device
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreted():
        if device.type != "cuda" or torch.version.hip is not None:
            return f"the model is on {device}: the kernels were made for NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) < OLDEST:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    if config.model_type not in FAMILIES:
        return f"model family {config.model_type!r} is not one of {', '.join(FAMILIES)}"
    if config.hidden_act not in ("silu", "swish", "gelu_pytorch_tanh"):
        return f"activation {config.hidden_act!r}"
    head_dim = model.units[0].unit.module(model.decoder.layers[0]).head_dim
    least = 16 if interpreted() else 32
    if head_dim & (head_dim - 1) or head_dim < least:
        return f"head size {head_dim} is not a power of two from {least}"
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
    """Why there is no GPU engine for a model here; None when there is."""
    return unsupported(model)
