"""Stage 1: fit the forecasters, by least squares in one pass (closed form) or by gradient (the paper's way)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.parts import ForecasterConfig
from ..evaluation.numbers import not_finite
from ..progress import Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.closed_form import Moments, solve
from ..routing.decision import AlwaysExecute, DecisionRule
from ..routing.state import Observation, Observer
from .objectives import forecast_loss

REFIT_EXECUTED_WEIGHT = 0.05
"""Weight of executed tokens in a refit: keeps units with few approximated tokens well posed."""


def observe(
    model: RoutedModelForCausalLM,
    rows: Tensor,
    observer: Observer,
    decision: DecisionRule,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> None:
    """Run rows [n, L] through the model without gradients and show every unit's input and output."""
    model.eval()
    with model.routing_state.using(observer=observer), model.deciding(decision), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            model.hidden_states(rows[start : start + batch_size].to(model.device))
            if progress is not None:
                progress.advance(min(start + batch_size, len(rows)))


def token_weights(seen: Observation, relative: bool, executed: float = REFIT_EXECUTED_WEIGHT) -> Tensor | None:
    """Weights [B * N, 1] of tokens in a least-squares fit, None when all are equal.

    `relative` is the configured weighting; where there are decisions, executed tokens count `executed` and
    approximated ones, which forecasts are for, count 1.
    """
    weight = seen.relative_weight if relative else None
    if seen.gate is None:
        return weight
    chosen = torch.where(seen.gate.detach().reshape(-1, 1) > 0.5, executed, 1.0)
    return chosen if weight is None else weight * chosen


def gather_moments(
    model: RoutedModelForCausalLM,
    rows: Tensor,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
    *,
    decision: DecisionRule | None = None,
) -> list[Moments]:
    """Second moments of all units in one streaming pass over rows [n, L]; nothing is stored.

    Of inputs, and of outputs less what a fallback's slice of the unit gives of them (`Observation.rest`).

    With a decision rule, approximated tokens count 1 and executed ones `REFIT_EXECUTED_WEIGHT`: the moments of the
    tokens that forecasts will really be used for, at inputs that earlier forecasts have already shifted.
    """
    width = model.routing_config.hidden_size
    relative = model.routing_config.forecaster.weighting == "relative"
    moments = [Moments(width, model.device) for _ in model.units]

    def observer(seen: Observation) -> None:
        x, y = seen.x.reshape(-1, width), seen.rest.reshape(-1, width)
        moments[seen.index].add(x, y, token_weights(seen, relative))

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    observe(model, rows[rank::world], observer, decision or AlwaysExecute(), progress=progress)
    if world > 1:
        for unit in moments:
            for tensor in unit.tensors():
                torch.distributed.all_reduce(tensor)
    return moments


@dataclass
class ForecastReport:
    """Quality of units' forecasts, in unit order, on text that the fit has not seen."""

    explained: list[float]
    """Share of the output variance explained by all that an approximated token gets."""
    relative: list[float]
    """The same with each token weighed by 1 / mean square of the residual stream: what the closed form optimises."""
    cosine: list[float]
    units: list[int]
    """Those that were judged, of which the lists are: all but attentions of static layers."""

    def as_dict(self, kinds: list[str]) -> dict[str, Any]:
        """Means by kind of unit, and the figures of each, for `fit.json`; `kinds` are those of all units."""
        kinds = [kinds[index] for index in self.units]

        def means(values: list[float]) -> dict[str, float]:
            groups = {kind: [v for v, k in zip(values, kinds, strict=True) if k == kind] for kind in kinds}
            return {kind: round(sum(group) / len(group), 4) for kind, group in groups.items()}

        return {
            "explained_variance": means(self.explained),
            "relative_explained_variance": means(self.relative),
            "cosine": means(self.cosine),
            "per_unit": [
                {
                    "layer": self.units[i] // 2,
                    "kind": kind,
                    "explained_variance": round(self.explained[i], 4),
                    "relative_explained_variance": round(self.relative[i], 4),
                    "cosine": round(self.cosine[i], 4),
                }
                for i, kind in enumerate(kinds)
            ],
        }


def fit_closed_form(
    model: RoutedModelForCausalLM,
    rows: Tensor,
    config: ForecasterConfig,
    *,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
    decision: DecisionRule | None = None,
) -> tuple[float, float]:
    """Least-squares forecasters for all units from rows [n, L]; returns seconds of (pass, solve).

    Raises WorkError for a unit whose inputs or outputs are not finite.
    """
    started = time.perf_counter()
    moments = gather_moments(model, rows, accelerator, progress, decision=decision)
    passed = time.perf_counter()
    for unit, found in zip(model.units, moments, strict=True):
        if unit.forecaster is not None:
            if not bool(found.xx.isfinite().all() and found.xy.isfinite().all()):
                what = f"an input or output of the {unit.kind} unit of layer {unit.index // 2}"
                raise not_finite(what, model, rows[:1])
            unit.forecaster.take(solve(found, config.ridge))
    return passed - started, time.perf_counter() - passed


class _Misses:
    """Weighted squared misses and output variance of every unit."""

    def __init__(self, units: int, width: int) -> None:
        kw: dict[str, Any] = {"dtype": torch.float64}
        self.error, self.squares, self.weight = (torch.zeros(units, **kw) for _ in range(3))
        self.sums = torch.zeros(units, width, **kw)

    def add(self, index: int, y: Tensor, predicted: Tensor, weight: Tensor) -> None:
        self.error[index] += (weight * (y - predicted).square()).sum().double().cpu()
        self.squares[index] += (weight * y.square()).sum().double().cpu()
        self.sums[index] += (weight * y).sum(0).double().cpu()
        self.weight[index] += weight.sum().double().cpu()

    def explained(self) -> list[float]:
        variance = self.squares - self.sums.square().sum(1) / self.weight.clamp(min=1e-30)
        return (1 - self.error / variance.clamp(min=1e-30)).tolist()


def measure(model: RoutedModelForCausalLM, rows: Tensor, progress: Progress | None = None) -> ForecastReport:
    """Explained variance and mean cosine of the forecasts on rows [n, L] that the fit has not seen."""
    units = model.units
    width = model.routing_config.hidden_size
    plain, relative = _Misses(len(units), width), _Misses(len(units), width)
    cosines = torch.zeros(len(units), dtype=torch.float64)

    def observer(seen: Observation) -> None:
        forecaster = units[seen.index].forecaster
        assert forecaster is not None
        y, rest = (part.reshape(-1, width).float() for part in (seen.output, seen.rest))
        predicted = y - rest + forecaster(seen.x.reshape(-1, width)).float()
        weight = seen.relative_weight
        relative.add(seen.index, y, predicted, weight)
        plain.add(seen.index, y, predicted, torch.ones_like(weight))
        cosines[seen.index] += F.cosine_similarity(predicted, y, dim=-1).sum().double().cpu()

    observe(model, rows, observer, AlwaysExecute(), progress=progress)
    cosine = (cosines / plain.weight.clamp(min=1)).tolist()
    judged = [unit.index for unit in units if unit.forecaster is not None]
    explained, weighed, cosine = (
        [all_[i] for i in judged] for all_ in (plain.explained(), relative.explained(), cosine)
    )
    return ForecastReport(explained, weighed, cosine, judged)


class ForecastObjective(nn.Module):
    """Sum over units of the fitting loss; the base runs without gradients and units do not influence each other."""

    def __init__(self, model: RoutedModelForCausalLM, config: ForecasterConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.scales: list[float] | None = None

    def forward(self, input_ids: Tensor, step: int) -> dict[str, Tensor]:
        losses: list[Tensor] = []
        units = self.model.units

        def observer(seen: Observation) -> None:
            forecaster = units[seen.index].forecaster
            assert forecaster is not None
            x, y = seen.x.detach(), seen.rest.detach()
            with torch.enable_grad():
                predicted = forecaster(x)
                scale = self.scales[seen.index] if self.scales is not None else 1.0
                losses.append(forecast_loss(self.config.loss, predicted / scale, y / scale))

        using = self.model.routing_state.using(observer=observer)
        with using, self.model.deciding(AlwaysExecute()), torch.no_grad():
            self.model.hidden_states(input_ids)
        return {"loss": torch.stack(losses).sum()}


def output_scales(model: RoutedModelForCausalLM, rows: Tensor) -> list[float]:
    """Root mean square of what every unit's forecaster predicts on rows [n, L], for `target: normalised`."""
    squares = [0.0] * len(model.units)

    def observer(seen: Observation) -> None:
        squares[seen.index] += float(seen.rest.float().square().mean())

    observe(model, rows[:4], observer, AlwaysExecute())
    return [max(value, 1e-12) ** 0.5 for value in squares]


def forecaster_parameters(model: RoutedModelForCausalLM) -> dict[str, nn.Parameter]:
    """The tensors that stage 1 trains."""
    return {n: p for n, p in model.routing_parameters() if ".forecaster." in n}


def offenders(model: RoutedModelForCausalLM, input_ids: Tensor) -> list[str]:
    """Names of the first units whose output or forecast is not finite on a batch, or whose weights are not."""
    found: list[str] = []
    for unit in model.units:
        if not all(bool(torch.isfinite(p).all()) for p in unit.parameters()):
            found.append(f"layer {unit.index // 2} {unit.kind}")
    if not found:

        def observer(seen: Observation) -> None:
            unit = model.units[seen.index]
            outputs = [seen.output] + ([unit.forecaster(seen.x)] if unit.forecaster is not None else [])
            if not all(bool(torch.isfinite(out).all()) for out in outputs):
                found.append(f"layer {seen.index // 2} {unit.kind}")

        training = model.training
        observe(model, input_ids, observer, model.routing_state.decision)
        model.train(training)
    return found[:4]
