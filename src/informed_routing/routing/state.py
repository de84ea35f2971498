"""What the routed layers of one model share during a forward, and what observers see of it."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from .decision import AlwaysExecute, DecisionRule

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
    modules_whole: bool = False
    """Whether the current forward must call the base model's attentions as they are, for what they also return."""
    valid: Tensor | None = None
    """[B, N] bool of the current forward; None when no token is padding."""
    contexts: Tensor | None = None
    """[B, N] of the current forward: keys visible to each token, itself included; 0 for padding."""
    layer_input: Tensor | None = None
    """[B, N, d]: the residual stream as it entered the current layer."""
    gates: MutableMapping[int, Tensor] = field(default_factory=dict)
    margins: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    """[B, N] float32, of units with a ranking router: what the updates of chosen tokens are multiplied by."""
    predictions: dict[int, Tensor] = field(default_factory=dict)
    """[B, N] float32: margins of the causal predictors, kept while ranking routers train."""
    keys_read: dict[int, Tensor] = field(default_factory=dict)
    """With kv='drop', of attention units: how many keys all executed queries attended to."""

    def begin(self, valid: Tensor | None, contexts: Tensor) -> None:
        """Forget the last forward."""
        self.valid, self.contexts = valid, contexts
        self.gates, self.margins = {}, {}
        self.weights, self.predictions, self.keys_read = {}, {}, {}

    @property
    def dense(self) -> bool:
        return self.decision.dense

    @property
    def ranks(self) -> bool:
        """Whether decisions depend on later tokens."""
        return not self.decision.causal

    def skips(self, training: bool) -> bool:
        """Whether layers run the sparse back end.

        A sampled decision has a gradient, which takes both branches; a hard one trains as it will run (stage 3).
        """
        return self.execution != "masked" and not self.modules_whole and (self.decision.hard or not training)
