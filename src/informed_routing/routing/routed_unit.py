"""A routed unit = a unit of the base model + a router + a fallback + a decision rule (the last kept by the state)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.kinds import kind as kind_of
from ..config.parts import ForecasterConfig, RouterConfig, SelectionConfig, UnitKind
from ..errors import InputError
from ..models.families import Family
from ..models.in_place import InPlaceUnit
from ..models.units import Unit
from .fallbacks.base import Fallback, LowRankForm
from .margins import margin_of
from .router import make_router
from .routers.base import Router, RouterForm
from .state import Observation, RoutingState


class RoutedUnit(nn.Module):
    """Router and forecaster beside one unit. The unit's own weights stay where the base model has them.

    A unit that is not routed (`selection.first_layer`, `every`) has no router and always executes; those of a kind that
    is not (`selection.units`) have no forecaster either; with
    `selection.granularity` = layer an FFN has none either and takes the decision of its layer's attention. Units of a
    static layer (`selection.static_layers`) have none and never execute: the attention gives nothing, and the FFN's
    forecaster predicts the update of the whole layer from the layer's input.
    """

    def __init__(
        self,
        index: int,
        kind: UnitKind,
        family: Family,
        layer: nn.Module,
        hidden_size: int,
        forecaster: ForecasterConfig,
        router: RouterConfig,
        selection: SelectionConfig | None = None,
    ) -> None:
        super().__init__()
        selection = selection or SelectionConfig()
        self.index = index
        self.unit = (InPlaceUnit if family.in_place else Unit)(kind, family)
        unknown = not (family.in_parts or family.private) if kind == "attention" else family.ffn is None
        self.reads = router.input
        self.is_static = selection.is_static(index // 2)
        self.predicts_raw = forecaster.target == "raw" and not self.is_static
        self.hidden_size = hidden_size
        self.first_tokens = selection.first_tokens
        fallback = kind_of("fallbacks", forecaster.fallback)
        make = fallback.make_static if self.is_static else fallback.make_for
        self.forecaster: Fallback | None = None
        self.always_executes = unknown or selection.units not in ("both", kind)
        if not self.always_executes and not (self.is_static and kind == "attention"):
            self.forecaster = make(forecaster, hidden_size, self.unit, layer)
        rank = 0 if self.forecaster is None else self.forecaster.rank
        self.is_routed = not unknown and selection.routes(index // 2, kind)
        self.joins = self.is_routed and selection.granularity == "layer"
        decides = self.is_routed and not (self.joins and kind == "ffn")
        self.router: Router | None = make_router(router, hidden_size, rank) if decides else None

    @property
    def kind(self) -> UnitKind:
        """`attention` or `ffn`."""
        return self.unit.kind

    @property
    def reads_residual(self) -> bool:
        """Whether the router reads the residual stream as it is, not the unit's normed input."""
        return self.reads == "residual"

    def unknown_to_engines(self) -> str | None:
        """What of this unit's parts no engine computes; None where `forms` has them all."""
        if self.router is None and not self.is_static:
            return "tokens or layers that always execute (selection)"
        if self.router is not None and self.router.form() is None:
            return f"a {type(self.router).__name__}"
        if self.forecaster is not None and self.forecaster.form() is None:
            return f"a {type(self.forecaster).__name__}"
        return None

    def forms(self) -> tuple[RouterForm | None, LowRankForm | None]:
        """Router (static units have none) and forecaster as engines compute them; without one the update is zero.

        Raises InputError where there is no such form (`unknown_to_engines`).
        """
        if reason := self.unknown_to_engines():
            raise InputError(f"no engine computes {reason}", "Use execution='sparse'")
        router = None if self.router is None else self.router.form()
        return router, None if self.forecaster is None else self.forecaster.form()

    def features(self, hidden: Tensor, x: Tensor) -> Tensor:
        """What forecaster and router read: the unit's normed input, or an own RMS norm where a family has none."""
        if not self.unit.has_input_norm:
            return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return x

    def forecast(self, layer: nn.Module, features: Tensor, x: Tensor) -> Tensor:
        """The update [..., d] that an approximated token gets, whose unit would have read x, [..., d]."""
        if self.forecaster is None:
            return torch.zeros_like(features)
        predicted = self.forecaster(features)
        own = self.own_slice(layer, x)
        predicted = predicted if own is None else own + predicted
        return self.unit.update(layer, predicted) if self.predicts_raw else predicted

    def own_slice(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What the fallback has of the unit itself, [..., d], in the form that it predicts; None for nothing."""
        index = None if self.forecaster is None else self.forecaster.chosen()
        if index is None:
            return None
        raw = self.unit.run_slice(layer, x, index)
        return raw if self.predicts_raw else self.unit.update(layer, raw)

    def decide(self, state: RoutingState, hidden: Tensor, features: Tensor) -> Tensor:
        """The gate [B, N] of this forward, recorded in the state. Padding is never worth executing."""
        if self.router is None:
            return self._decided(state, hidden)
        read = {"normed": features, "residual": hidden, "layer": state.forward.layer_input}[self.reads]
        assert read is not None
        logits = self.router(read)
        if self.router.ranks:
            logits = self._ranked(state, self.router.score(read), logits)
        if self.first_tokens and state.forward.contexts is not None:
            first = (state.forward.contexts > 0) & (state.forward.contexts <= self.first_tokens)
            logits = _with_margin(logits, first, torch.inf)
        if state.ranks and state.forward.valid is not None:
            logits = _with_margin(logits, ~state.forward.valid, -torch.inf)
        if state.decision.held:
            gate = state.decision.decide_after(logits, self.index, state.forward.contexts, state.forward.history)
        else:
            gate = state.decision.decide(logits, self.index, state.forward.contexts)
        if state.forward.valid is not None:
            gate = gate & state.forward.valid if gate.dtype == torch.bool else gate * state.forward.valid
        state.forward.gates[self.index] = gate
        if state.record_margins:
            state.forward.margins[self.index] = margin_of(logits).detach()
        return gate

    def _decided(self, state: RoutingState, hidden: Tensor) -> Tensor:
        """The gate of a unit without a router: that of its layer's attention, nothing (static), or everything."""
        first = self.index - 1
        if self.is_static:
            gate = torch.zeros(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        elif self.joins:
            gate = state.forward.gates[first]
        elif state.forward.valid is not None:
            gate = state.forward.valid
        else:
            gate = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        state.forward.gates[self.index] = gate
        if state.record_margins:
            always = torch.full(gate.shape, -torch.inf if self.is_static else torch.inf, device=gate.device)
            state.forward.margins[self.index] = state.forward.margins[first] if self.joins else always
        return gate

    def _ranked(self, state: RoutingState, score: Tensor, predicted: Tensor) -> Tensor:
        """The logits of a ranking router that the current rule takes, and what else the state keeps of it."""
        state.forward.weights[self.index] = torch.sigmoid(score)
        if not state.ranks:
            return predicted
        if self.training:
            state.forward.predictions[self.index] = margin_of(predicted)
        return torch.stack([torch.zeros_like(score), score], dim=-1)

    def observe(
        self,
        state: RoutingState,
        layer: nn.Module,
        hidden: Tensor,
        x: Tensor,
        raw: Tensor,
        update: Tensor,
        gate: Tensor | None,
        after: Tensor,
    ) -> None:
        """Show one unit's input x and output to the observer, if there is one and the unit is not always executed."""
        if state.observer is None or self.always_executes:
            return
        output = raw if self.predicts_raw else update
        with torch.no_grad():
            own = self.own_slice(layer, x)
            rest = output if own is None else output.detach() - own
        features = self.features(hidden, x)
        state.observer(Observation(self.index, features, x, output, rest, gate, hidden, after))


def _with_margin(logits: Tensor, where: Tensor, margin: float) -> Tensor:
    """Logits [..., 2] with an infinite margin at some tokens: decided whatever the rule, without a gradient."""
    return logits.masked_fill(where.unsqueeze(-1) & torch.tensor([False, True], device=where.device), margin)
