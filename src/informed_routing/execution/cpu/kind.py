"""The CPU engine as a row of the table of engines (see `EngineKind`): it packs copies of a model's weights."""

from __future__ import annotations

from typing import Any

import torch

from ...progress import Progress
from ..engine import Factors, NativeEngine, Policy
from ..formats import Weights, packed_of
from .availability import native_reason


class CpuKind:
    """See `EngineKind`."""

    holds = True

    def reason(self, model: Any, progress: Progress | None) -> str | None:
        return native_reason(model, progress)

    def own_format(self, dtype: torch.dtype, factors: Factors) -> Weights:
        own = packed_of(dtype)
        return factors if own == "float32" else own

    def make(self, model: Any, weights: Weights | None, threads: int | None, policy: Policy) -> NativeEngine:
        from .engine import CpuEngine

        own = self.own_format(model.dtype, "float32")
        return CpuEngine(model, weights or own, threads, policy)  # type: ignore[arg-type]  # it refuses float16
