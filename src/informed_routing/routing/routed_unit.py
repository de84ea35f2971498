"""A routed unit = a unit of the base model + a router + a fallback + a decision rule (the last kept by the state)."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ForecasterConfig, RouterConfig, UnitKind
from ..models.families import Family
from ..models.units import Unit
from .decision import AlwaysExecute, DecisionRule, Threshold
from .forecaster import Forecaster
from .router import Router

Execution = Literal["masked", "sparse", "native"]
KeyValues = Literal["keep", "drop"]


@dataclass
class Observation:
    """What an observer sees of one unit in one forward. Row order is [B, N] flattened; pads are included."""

    index: int
    x: Tensor
    """[B, N, d]: what forecaster and router read."""
    output: Tensor
    """[B, N, d]: the unit's contribution in the form that the forecaster predicts."""
    gate: Tensor | None
    """[B, N]: the decision, None while everything executes."""
    residual: Tensor
    """[B, N, d]: the residual stream that the output is added to."""
    after: Tensor
    """[B, N, d]: the residual stream with this unit's update or forecast added. Part of the graph, if there is one."""

    @property
    def relative_weight(self) -> Tensor:
        """1 / mean square of the residual stream, [B * N, 1]: how much a miss of one unit of length matters.

        Later norms divide by the stream's size, so the same miss means little where the stream is large. Without
        this the few tokens with massive activations decide the whole least-squares fit.
        """
        squares = self.residual.detach().float().square().mean(-1)
        return (1 / squares.clamp(min=1e-12)).reshape(-1, 1)


Observer = Callable[[Observation], None]


class GateBlock(UserDict[int, Tensor]):
    """Gates of a whole forward, kept as one bool tensor [units, B, N] and split only if somebody looks."""

    def __init__(self, block: Tensor) -> None:
        self.block = block

    @functools.cached_property
    def data(self) -> dict[int, Tensor]:  # type: ignore[override]
        return dict(enumerate(self.block.unbind()))


@dataclass
class RoutingState:
    """What the routed layers of one model share during a forward. Not a module: it holds no weights."""

    decision: DecisionRule = field(default_factory=AlwaysExecute)
    execution: Execution = "sparse"
    kv: KeyValues = "keep"
    native: Any = None
    """The native engine's holder (execution/native.py) where execution is `native`."""
    observer: Observer | None = None
    record_margins: bool = False
    valid: Tensor | None = None
    """[B, N] bool of the current forward; None when no token is padding."""
    gates: MutableMapping[int, Tensor] = field(default_factory=dict)
    margins: dict[int, Tensor] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        return isinstance(self.decision, AlwaysExecute)

    def skips(self, training: bool) -> bool:
        """Whether layers run the sparse back end.

        A sampled decision has a gradient, which takes both branches; a hard one trains as it will run (stage 3).
        """
        hard = isinstance(self.decision, (AlwaysExecute, Threshold))
        return self.execution != "masked" and (hard or not training)


class RoutedUnit(nn.Module):
    """Router and forecaster beside one unit. The unit's own weights stay where the base model has them."""

    def __init__(
        self,
        index: int,
        kind: UnitKind,
        family: Family,
        hidden_size: int,
        forecaster: ForecasterConfig,
        router: RouterConfig,
    ) -> None:
        super().__init__()
        self.index = index
        self.unit = Unit(kind, family)
        self.reads_residual = router.input == "residual"
        self.predicts_raw = forecaster.target == "raw"
        self.forecaster: Forecaster | None = None
        rank = 0
        if forecaster.fallback == "forecaster":
            rank = forecaster.rank
            self.forecaster = Forecaster(hidden_size, rank, forecaster.activation)
        self.router = Router(router, hidden_size, rank)

    @property
    def kind(self) -> UnitKind:
        return self.unit.kind

    def features(self, hidden: Tensor, x: Tensor) -> Tensor:
        """What forecaster and router read: the unit's normed input, or an own RMS norm where a family has none."""
        if not self.unit.has_input_norm:
            return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return x

    def logits(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Router logits [..., 2], float32."""
        if self.reads_residual:
            features = hidden
        return self.router(features)

    def forecast(self, layer: nn.Module, features: Tensor) -> Tensor:
        """The update [..., d] that an approximated token gets."""
        if self.forecaster is None:
            return torch.zeros_like(features)
        predicted = self.forecaster(features)
        return self.unit.update(layer, predicted) if self.predicts_raw else predicted

    def decide(self, state: RoutingState, hidden: Tensor, features: Tensor) -> Tensor:
        """The gate [B, N] of this forward, recorded in the state. Padding is never worth executing."""
        logits = self.logits(hidden, features)
        gate = state.decision(logits)
        if state.valid is not None:
            gate = gate & state.valid if gate.dtype == torch.bool else gate * state.valid
        state.gates[self.index] = gate
        if state.record_margins:
            state.margins[self.index] = (logits[..., 1] - logits[..., 0]).detach()
        return gate

    def observe(
        self,
        state: RoutingState,
        hidden: Tensor,
        x: Tensor,
        raw: Tensor,
        update: Tensor,
        gate: Tensor | None,
        after: Tensor,
    ) -> None:
        """Show one unit's input and output to the observer, if there is one."""
        if state.observer is not None:
            target = raw if self.predicts_raw else update
            state.observer(Observation(self.index, x, target, gate, hidden, after))
