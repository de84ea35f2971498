"""Which engine runs a routed model where it is, with which weights, and why: the one place that decides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..config.kinds import kind
from ..progress import Progress
from .engine import EngineKind, Factors, NativeEngine, Policy
from .formats import Weights


@dataclass(frozen=True)
class EngineChoice:
    """The native engine with its format of `weights`, or, where there is an `obstacle`, a torch back end."""

    weights: Weights
    obstacle: str | None = None
    """Why the native engine cannot run; None when it can."""

    @property
    def native(self) -> bool:
        """Whether the native engine runs."""
        return self.obstacle is None

    @property
    def reason(self) -> str:
        """Why, in words for users."""
        return "it runs this model on this machine" if self.obstacle is None else f"not native: {self.obstacle}"


def choose_engine(
    model: Any,
    *,
    kv: str | None = None,
    decision: str = "threshold",
    factors: Factors = "float32",
    progress: Progress | None = None,
) -> EngineChoice:
    """The engine for a routed model: the native one of its device wherever that can do all that is asked.

    `kv` None is the model's own; `decision` is how tokens will be chosen; `factors` is what products of a float32
    model may be rounded to. Compiles the engine if need be, saying so.
    """
    weights = kind_of(model.device).own_format(model.dtype, factors)
    if (kv or model.routing_state.kv) == "drop":
        return EngineChoice(weights, "kv='drop' needs a torch engine")
    if not kind("rules", decision).causal:
        return EngineChoice(weights, f"the {decision} of a sequence needs a torch engine")
    if kind("rules", decision).held and not kind_of(model.device).holds:
        return EngineChoice(weights, f"it knows no {decision} rule on this device")
    return EngineChoice(weights, native_reason(model, progress))


def native_reason(model: Any, progress: Progress | None = None) -> str | None:
    """Why there is no native engine for a model where it is; None when there is. Compiles it if need be, saying so."""
    return kind_of(model.device).reason(model, progress)


def make_engine(model: Any, weights: Weights | None, threads: int | None, policy: Policy) -> NativeEngine:
    """The native engine of a model's device; `weights` None is the model's own format. Raises InputError."""
    return kind_of(model.device).make(model, weights, threads, policy)


def kind_of(device: torch.device) -> EngineKind:
    """The engine that is made for a device."""
    if device.type == "cpu":
        from .cpu.kind import CpuKind

        return CpuKind()
    from .gpu.kind import GpuKind

    return GpuKind()
