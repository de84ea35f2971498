"""The GPU engine as a row of the table of engines (see `EngineKind`): it reads a model's weights where they are."""

from __future__ import annotations

from typing import Any, cast

import torch

from ...progress import Progress
from ..engine import Factors, NativeEngine, Policy
from ..formats import Weights
from .availability import native_reason


class GpuKind:
    """See `EngineKind`."""

    holds = False

    def reason(self, model: Any, progress: Progress | None) -> str | None:
        return native_reason(model, progress)

    def own_format(self, dtype: torch.dtype, factors: Factors) -> Weights:
        return cast(Weights, str(dtype).removeprefix("torch."))

    def make(self, model: Any, weights: Weights | None, threads: int | None, policy: Policy) -> NativeEngine:
        from .engine import GpuEngine  # only here: whether there is Triton can be asked without it

        return GpuEngine(model, weights, policy)
