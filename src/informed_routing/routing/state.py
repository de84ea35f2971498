"""What the routed layers of one model share during a forward, and what observers see of it."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from .decision import AlwaysExecute, DecisionRule
from .history import History
from .rules.base import as_rule

Execution = Literal["masked", "sparse", "native"]
KeyValues = Literal["keep", "drop"]


@dataclass
class Observation:
    """What an observer sees of one unit in one forward. Row order is [B, N] flattened; pads are included."""

    index: int
    x: Tensor
    """[B, N, d]: what forecaster and router read."""
    read: Tensor
    """[B, N, d]: what the unit itself read; another than `x` only where a family has no input norm."""
    output: Tensor
    """[B, N, d]: the unit's contribution in the form that its fallback predicts."""
    rest: Tensor
    """[B, N, d]: what of `output` the fallback's weights are for: all that its slice of the unit does not give."""
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


@dataclass(frozen=True)
class Settings:
    """How a model routes until somebody chooses otherwise."""

    decision: DecisionRule = field(default_factory=AlwaysExecute)
    execution: Execution = "sparse"
    kv: KeyValues = "keep"
    native: Any = None
    """The native engine's holder (execution/native.py) where execution is `native`."""
    observer: Observer | None = None
    record_margins: bool = False
    policy: str = "exact"
    """Of the sparse back end: `auto` executes calls whole where skipping takes longer (execution/worth.py)."""
    by_units: bool = False
    """Whether layers run by their units where everything executes, too: to check that they are the base model's."""
    share: float = 0.75
    """Of a unit's tokens that are likely to be executed, while nothing was seen of it."""


@dataclass
class Forward:
    """What one forward has decided so far, and what its layers must know of it."""

    valid: Tensor | None = None
    """[B, N] bool; None when no token is padding."""
    contexts: Tensor | None = None
    """[B, N]: keys visible to each token, itself included; 0 for padding."""
    history: History | None = None
    """What the texts of this forward have approximated before, where the decision rule is held to shares of it."""
    modules_whole: bool = False
    """Whether it must call the base model's attentions as they are, for what they also return."""
    layer: Any = None
    """The layer that runs, where its FFN is routed where it is called."""
    rows: Any = None
    """Which tokens private matrices are computed for (execution/private_rows.py); None: all."""
    layer_input: Tensor | None = None
    """[B, N, d]: the residual stream as it entered the current layer."""
    gates: MutableMapping[int, Tensor] = field(default_factory=dict)
    """[B, N] by unit. Keyed, not appended: recomputation under checkpointing overwrites."""
    margins: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    """[B, N] float32, of units with a ranking router: what the updates of chosen tokens are multiplied by."""
    predictions: dict[int, Tensor] = field(default_factory=dict)
    """[B, N] float32: margins of the causal predictors, kept while ranking routers train."""
    rounded_up: set[int] = field(default_factory=set)
    """Units whose call was executed whole because skipping takes longer."""
    keys_read: dict[int, Tensor] = field(default_factory=dict)
    """With kv='drop', of attention units: how many keys all executed queries attended to."""


class RoutingState:
    """What the routed layers of one model share: its settings, and the record of the last forward.

    Not a module: it holds no weights. Settings are read here, and change by `choose` (what a user asks for, to stay) or
    for the length of a block by `using`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.forward = Forward()
        self.shares: dict[int, float] = {}
        """Of each unit's tokens that were executed, in the last forwards in which it decided."""
        self.pays: dict[tuple[Any, ...], bool] = {}
        """Whether skipping pays, by unit, size and share (execution/worth.py)."""

    def choose(self, **settings: Any) -> None:
        """Change settings, by name, until somebody chooses again."""
        if "decision" in settings:
            settings["decision"] = as_rule(settings["decision"])
        self.settings = replace(self.settings, **settings)

    @contextmanager
    def using(self, **settings: Any) -> Iterator[None]:
        """Change settings for the length of a block; they are as before after it, whatever was chosen within."""
        before = {name: getattr(self.settings, name) for name in settings}
        self.choose(**settings)
        try:
            yield
        finally:
            self.choose(**before)

    @property
    def decision(self) -> DecisionRule:
        """The decision rule."""
        return self.settings.decision

    @property
    def execution(self) -> Execution:
        """How units are computed."""
        return self.settings.execution

    @property
    def kv(self) -> KeyValues:
        """Whether approximated tokens leave keys."""
        return self.settings.kv

    @property
    def native(self) -> Any:
        """The native engine's holder; None without one."""
        return self.settings.native

    @property
    def observer(self) -> Observer | None:
        """What sees each unit of a forward; None for nobody."""
        return self.settings.observer

    @property
    def record_margins(self) -> bool:
        """Whether a forward keeps its margins."""
        return self.settings.record_margins

    @property
    def policy(self) -> str:
        """Whether the sparse back end always does what routers say."""
        return self.settings.policy

    @property
    def rounds(self) -> bool:
        """Whether calls may be executed whole where skipping does not pay: not while their margins are asked for."""
        return self.policy == "auto" and not self.record_margins

    @property
    def dense(self) -> bool:
        """Whether every token executes every unit that is routed."""
        return self.decision.dense

    @property
    def original(self) -> bool:
        """Whether static layers execute, too."""
        return self.decision.original

    @property
    def ranks(self) -> bool:
        """Whether decisions depend on later tokens."""
        return not self.decision.causal

    def skips(self, training: bool) -> bool:
        """Whether layers run the sparse back end.

        A sampled decision has a gradient, which takes both branches; a hard one trains as it will run (stage 3).
        """
        return self.execution != "masked" and not self.forward.modules_whole and (self.decision.hard or not training)
