"""Which routed models the CPU engine can run here, and why not the others."""

from __future__ import annotations

from typing import Any

from ...errors import InformedRoutingError
from ...progress import Progress
from ..architecture import slices_of, unknown
from ..formats import GROUP
from .build import compiler, is_built, library


def unsupported(model: Any) -> str | None:
    """Why the engine cannot run this routed model; None when it can."""
    if reason := unknown(model, "cpu"):
        return reason
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    attention = model.units[0].unit.module(model.decoder.layers[0])
    panel = int(library().ir_panel())
    for name, width, step in (
        ("head size", attention.head_dim, panel // 2),
        ("hidden size", model.config.hidden_size, panel),
    ):
        if width % step:
            return f"{name} {width} is no multiple of {step}"
    for count in slices_of(model):
        if not count or count % GROUP:
            return f"a slice of {count} neurons, which come in {GROUP}s"
    return None


def native_reason(model: Any, progress: Progress | None = None) -> str | None:
    """Why there is no native engine for a model here; None when there is. Compiles it if need be, saying so."""
    try:
        if progress is not None and compiler() and not is_built():
            progress.message("compiling the native engine for this machine (once)")
        return unsupported(model)
    except InformedRoutingError as error:
        return str(error)
