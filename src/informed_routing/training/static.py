"""The search for static layers: greedily those without which the model's next tokens change least.

A candidate is judged with the forecaster that would replace it, in closed form from second moments of the layer's input
and of all that it adds to the stream; one pass gathers those of all layers, and they are gathered anew once a layer is
taken. Which few layers are worth comparing is known after the first round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.parts import ForecasterConfig
from ..config.recipe import StaticSearch
from ..execution.attach import make_units
from ..execution.layer import add_units
from ..execution.possible import never_static
from ..models.head import lm_head
from ..progress import NullProgress, Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.closed_form import Moments, solve
from ..routing.decision import AlwaysExecute, DecisionRule, ExecuteRouted
from ..routing.routed_unit import RoutedUnit
from ..routing.state import Observation
from .forecast import observe, token_weights

BATCH = 4
CHUNK = 256
"""Rows of logits at a time."""


def eligible(model: RoutedModelForCausalLM) -> list[int]:
    """The layers that may become static."""
    layers = len(model.decoder.layers)
    needed = never_static(model.config, layers)
    return [place for place in range(layers) if place not in needed and not _ffn(model, place).is_static]


class Search:
    """The state of one search, which goes on from `record` (what `record` gave of an interrupted one)."""

    def __init__(
        self,
        model: RoutedModelForCausalLM,
        config: StaticSearch,
        rows: Tensor,
        fit_rows: Tensor,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.config, self.rows, self.fit_rows = model, config, rows, fit_rows
        routing = model.routing_config.forecaster
        plain = {"fallback": "forecaster", "slice": None} if routing.is_fitted else {}
        self.forecaster = ForecasterConfig.model_validate({**routing.model_dump(), **plain})
        record = record or {}
        self.layers: list[int] = list(record.get("layers", ()))
        self.divergence: list[float] = list(record.get("divergence", ()))
        """Nats a token, once each of `layers` was taken."""
        self.first_round: list[tuple[int, float]] = [(place, kl) for place, kl in record.get("candidates", ())]
        """Layers with what each alone costs, the cheapest first."""
        self.head = lm_head(model)

    @property
    def record(self) -> dict[str, Any]:
        """What has been found, as JSON values."""
        return {"layers": self.layers, "divergence": self.divergence, "candidates": self.first_round}

    def run(self, done: Callable[[], None], progress: Progress | None = None) -> None:
        """Take layers until there are as many as asked for, calling `done` after each; the model is left as it was."""
        progress = progress or NullProgress()
        with torch.random.fork_rng(devices=[]), self._restored(), torch.no_grad():
            for taken in range(len(self.layers)):  # their forecasters are what the interrupted search had
                self._take(self.layers[taken], progress, f"static layers: {taken + 1} again")
            teacher = self._hidden(AlwaysExecute())
            while len(self.layers) < self.config.layers:
                self._round(teacher, progress)
                done()

    def _round(self, teacher: Tensor, progress: Progress) -> None:
        name, candidates = f"static layers: {len(self.layers) + 1} of {self.config.layers}", self._candidates()
        moments = self._moments(candidates, progress, name)
        progress.stage(name, len(candidates))
        found = []
        for number, place in enumerate(candidates, start=1):
            with self._static(place, moments.get(place)):
                found.append((place, self._divergence(teacher)))
            progress.advance(number, kl=found[-1][1])
        if not self.layers:
            self.first_round = sorted(found, key=lambda one: one[1])
        place, divergence = min(found, key=lambda one: one[1])
        add_units(self.model.decoder.layers[place], *self._units(place, moments.get(place)))
        self.layers.append(place)
        self.divergence.append(divergence)

    def _candidates(self) -> list[int]:
        """All layers at first; later the best of the first round, as many as asked for and no fewer than are wanted."""
        if not self.first_round:
            return eligible(self.model)
        left = [place for place, _ in self.first_round if place not in self.layers]
        return left[: max(self.config.candidates, self.config.layers - len(self.layers))]

    def _take(self, place: int, progress: Progress, name: str) -> None:
        moments = self._moments([place], progress, name)
        add_units(self.model.decoder.layers[place], *self._units(place, moments.get(place)))

    def _units(self, place: int, moments: Moments | None) -> tuple[RoutedUnit, RoutedUnit]:
        config = self.model.routing_config
        selection = config.selection.model_copy(update={"static_layers": (place,)})
        attention, ffn = make_units(self.model, place, self.forecaster, config.router, selection)
        if moments is not None and ffn.forecaster is not None:
            ffn.forecaster.take(solve(moments, self.forecaster.ridge))
        return attention, ffn.to(dtype=self.model.dtype)

    @contextmanager
    def _static(self, place: int, moments: Moments | None) -> Iterator[None]:
        """A layer static within."""
        layer = self.model.decoder.layers[place]
        before = layer.attention_routing, layer.ffn_routing
        add_units(layer, *self._units(place, moments))
        try:
            yield
        finally:
            add_units(layer, *before)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        layers = self.model.decoder.layers
        before = [(layer.attention_routing, layer.ffn_routing) for layer in layers]
        try:
            yield
        finally:
            for layer, units in zip(layers, before, strict=True):
                add_units(layer, *units)

    def _moments(self, places: Sequence[int], progress: Progress, name: str) -> dict[int, Moments]:
        """Of layers' inputs, as their FFN's forecaster reads them, and updates, with the layers taken so far static."""
        if not self.forecaster.is_fitted:
            return {}
        model, width = self.model, self.model.routing_config.hidden_size
        relative = self.forecaster.weighting == "relative"
        moments = {place: Moments(width, model.device) for place in places}
        entered: dict[int, Observation] = {}

        def observer(seen: Observation) -> None:
            place, layer = seen.index // 2, model.decoder.layers[seen.index // 2]
            if place not in moments:
                return
            if seen.index % 2 == 0:
                entered[place] = seen
                return
            before = entered.pop(place)
            hidden, ffn = before.residual, _ffn(model, place)
            x = ffn.features(hidden, ffn.unit.normed(layer, hidden)).reshape(-1, width)
            update = (seen.after - hidden).reshape(-1, width)
            moments[place].add(x, update, token_weights(before, relative))

        progress.stage(f"{name} (fit)", len(self.fit_rows))
        observe(model, self.fit_rows, observer, ExecuteRouted(), batch_size=BATCH, progress=progress)
        return moments

    def _hidden(self, rule: DecisionRule) -> Tensor:
        """Last hidden states [n, L, d] of the rows that candidates are compared on."""
        self.model.eval()
        with self.model.deciding(rule):
            parts = [self.model.hidden_states(part.to(self.model.device)) for part in self.rows.split(BATCH)]
        return torch.cat(parts)

    def _divergence(self, teacher: Tensor) -> float:
        """KL divergence of the next token from the original's, in nats: a mean over all tokens."""
        width = teacher.shape[-1]
        hidden, total = self._hidden(ExecuteRouted()).reshape(-1, width), 0.0
        for own, wanted in zip(hidden.split(CHUNK), teacher.reshape(-1, width).split(CHUNK), strict=True):
            predicted, target = (self.head(part).float().log_softmax(-1) for part in (own, wanted))
            total += float(F.kl_div(predicted, target, reduction="sum", log_target=True))
        return total / len(hidden)


def _ffn(model: RoutedModelForCausalLM, place: int) -> RoutedUnit:
    unit: RoutedUnit = model.decoder.layers[place].ffn_routing
    return unit
