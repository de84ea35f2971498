"""Which routed models the GPU engine can run here, and why not the others."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from ...progress import Progress
from ..architecture import slices_of, unknown

OLDEST = (8, 0)
"""Compute capability: bfloat16 tensor cores and asynchronous copies."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(model: Any) -> str | None:
    """Why the engine cannot run this routed model; None when it can."""
    device = model.device
    if reason := unknown(model, "gpu"):
        return reason
    if model.routing_config.selection.static_layers:
        return "static layers"
    if any(slices_of(model)):
        return "a slice of an FFN itself (forecaster.fallback = slim), which only the CPU engine computes"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreted():
        if device.type != "cuda" or torch.version.hip is not None:
            return f"the model is on {device}: the kernels were made for NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) < OLDEST:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    head_dim = model.units[0].unit.module(model.decoder.layers[0]).head_dim
    least = 16 if interpreted() else 32
    if head_dim & (head_dim - 1) or head_dim < least:
        return f"head size {head_dim} is not a power of two from {least}"
    return None


def native_reason(model: Any, progress: Progress | None = None) -> str | None:
    """Why there is no GPU engine for a model here; None when there is."""
    return unsupported(model)
