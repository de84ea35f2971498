"""Closed-form start of the routers: regress each margin on what approximating the token would cost.

To second order, approximating a unit for a token costs half the squared derivative of the loss along the miss,
<dL/dh, update - forecast>^2. Its logarithm splits into the size of the miss and the loss's sensitivity to it, which the
router's own input predicts to different degrees, so each gets a ridge regression of its own strength; a constant per
unit makes the mean cost right. Their sum orders tokens of all units on one scale and becomes the margin.

Misses do not act alone: a token that looks unimportant in the dense model loses all its units at once. So the first
sweep, over the dense model, is followed by sweeps over the model as it is routed so far: sensitivities are those that
approximation leaves, and the forecasters are solved again at the inputs and on the tokens that they are used for.
Statistics of all sweeps add up, which keeps decisions from swinging back and forth.

The paper starts routers at random; here stage 2 starts near a good router, and a short stage 2 is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..config.recipe import ObjectiveConfig
from ..models.head import lm_head
from ..progress import NullProgress, Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.closed_form import Moments, solve
from ..routing.decision import DecisionRule, ExecuteRouted, Threshold
from ..routing.state import Observation
from ..routing.target import BudgetMeter
from .calibrate import threshold_at
from .forecast import REFIT_EXECUTED_WEIGHT, token_weights
from .objectives import next_token_loss

MARGIN_SCALE = 2.0
"""Margin per unit of log cost: decided enough that sampling is not noise, soft enough to learn from."""

MISS_RIDGE, SENSITIVITY_RIDGE = 1e-2, 0.3
"""Relative to the mean input variance. Sensitivity is a single noisy derivative a token: it needs the stronger one."""

DENSE_WEIGHT = 0.25
"""Weight of the dense sweep in the forecasters that later sweeps solve again."""

THRESHOLD_TOKENS = 2048


def warm_start(
    model: RoutedModelForCausalLM,
    sweeps: Sequence[Tensor],
    meter: BudgetMeter,
    target: float,
    *,
    batch_size: int = 4,
    refit_ridge: float | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Write closed-form margins into all routers; sampling then realises `target` at the start.

    `sweeps` are rows [n, L], the first for the dense model, each later one for the model as routed so far. With
    `refit_ridge` the later ones also solve the forecasters again. An MLP router carries the regression in a pair of
    ReLU units of opposite sign. Returns the explained shares of both regressions and the loss of each sweep.
    """
    progress = progress or NullProgress()
    statistics = _Statistics(model, refit_ridge is not None)
    report: dict[str, object] = {}
    losses: list[float] = []
    done = 0
    for number, rows in enumerate(sweeps):
        rule: DecisionRule = ExecuteRouted()
        if number:
            some = rows[: max(THRESHOLD_TOKENS // rows.shape[1], 1)]
            rule = Threshold(threshold_at(model, some, target, meter.budget))
        total = 0.0
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(model.device)
            total += statistics.add(batch, rule)
            done += batch.shape[0]
            progress.advance(done)
        losses.append(total / rows.numel())
        if number and refit_ridge is not None:
            statistics.solve_forecasters(refit_ridge)
        report = statistics.solve_routers(meter, target)
    return {**report, "losses": losses}


class _Leaf(DecisionRule):
    """Another rule's decision as a float leaf, so that backward leaves dL/dgate on it."""

    def __init__(self, rule: DecisionRule) -> None:
        self.rule = rule

    def __call__(self, logits: Tensor) -> Tensor:
        return self.rule(logits.detach()).float().requires_grad_()


@dataclass
class _Seen:
    x: Tensor
    log_miss: Tensor
    gate: Tensor
    after: Tensor


class _Statistics:
    """Second moments of (router input, [log miss, log sensitivity]) of all units, and those of their forecasters."""

    def __init__(self, model: RoutedModelForCausalLM, forecasters: bool) -> None:
        self.model, self.head = model, lm_head(model)
        self.width = model.routing_config.hidden_size
        self.relative = model.routing_config.forecaster.weighting == "relative"
        units = model.units
        self.routed = [unit for unit in units if unit.router is not None]
        self.routers = [Moments(self.width, model.device, outputs=2) for _ in self.routed]
        self.forecasters = [Moments(self.width, model.device) for _ in units] if forecasters else None
        self.costs = torch.zeros(len(self.routed), dtype=torch.float64)
        self.tokens = 0
        self.last: list[Tensor] = []
        self.dense = True
        self._seen: dict[int, _Seen] = {}

    def add(self, batch: Tensor, rule: DecisionRule) -> float:
        """One forward and backward of ids [B, L] under a rule; returns the summed loss."""
        model = self.model
        self._seen = {}
        self.dense = rule.dense
        training = model.training
        model.train()
        try:
            with model.routing_state.using(observer=self._observe), model.deciding(_Leaf(rule)):
                hidden = model.hidden_states(batch)
                loss = next_token_loss(hidden, batch, self.head, ObjectiveConfig(), reduction="sum")
                seen = [self._seen[unit.index] for unit in self.routed]
                # After recomputation under activation checkpointing these are still the tensors of the graph.
                wanted = [s.after for s in seen] + [s.gate for s in seen]
                gradients = torch.autograd.grad(loss, wanted)
        finally:
            model.train(training)
        for i, one in enumerate(seen):
            sensitivity = gradients[i].reshape(-1, self.width).float().square().sum(-1).clamp(min=1e-20).log()
            self.routers[i].add(one.x, torch.stack([one.log_miss, sensitivity], dim=1))
            self.costs[i] += gradients[len(seen) + i].double().square().sum().cpu()
        self.tokens += batch.numel()
        self.last = [s.x for s in seen]  # one batch is enough to place the margins
        return float(loss.detach())

    @torch.no_grad()
    def _observe(self, seen: Observation) -> None:
        if seen.index in self._seen:  # recomputation under activation checkpointing
            return
        assert seen.gate is not None
        x, y = (t.detach().reshape(-1, self.width).float() for t in (seen.x, seen.rest))
        forecaster = self.model.units[seen.index].forecaster
        miss = y if forecaster is None else y - forecaster(x).float()
        log_miss = miss.square().sum(-1).clamp(min=1e-20).log()
        self._seen[seen.index] = _Seen(x, log_miss, seen.gate, seen.after)
        if self.forecasters is not None:
            executed = DENSE_WEIGHT if self.dense else REFIT_EXECUTED_WEIGHT
            self.forecasters[seen.index].add(x, y, token_weights(seen, self.relative, executed))

    def solve_forecasters(self, ridge: float) -> None:
        assert self.forecasters is not None
        for unit, moments in zip(self.model.units, self.forecasters, strict=True):
            if unit.forecaster is not None:
                unit.forecaster.take(solve(moments, ridge))

    def solve_routers(self, meter: BudgetMeter, target: float) -> dict[str, object]:
        weights: list[Tensor] = []
        constants: list[float] = []
        explained: dict[str, list[tuple[float, float]]] = {}
        for unit, moments, cost in zip(self.routed, self.routers, self.costs, strict=True):
            found = _Regression(moments)
            miss, sensitivity = found.ridge(0, MISS_RIDGE), found.ridge(1, SENSITIVITY_RIDGE)
            both = miss + sensitivity
            # The mean of exp(w x + c) shall be the mean cost; exact for normal inputs.
            constant = (cost / self.tokens).clamp(min=1e-30).log() - float(found.mean @ both)
            constants.append(float(constant - 0.5 * float(both @ found.cov @ both)))
            weights.append(both.float())
            explained.setdefault(unit.kind, []).append((found.explained(0, miss), found.explained(1, sensitivity)))
        margins = torch.stack([(x @ w).cpu() + c for x, w, c in zip(self.last, weights, constants, strict=True)])
        margins = margins * MARGIN_SCALE
        others = torch.tensor([float(not unit.always_executes) for unit in self.model.units])
        shift = _shift(margins, [unit.index for unit in self.routed], others, meter, target)
        for unit, w, c in zip(self.routed, weights, constants, strict=True):
            assert unit.router is not None
            unit.router.take(w * MARGIN_SCALE, c * MARGIN_SCALE - shift)
        return {
            "explained": {
                f"{what}_{kind}": round(sum(e[j] for e in explained[kind]) / len(explained[kind]), 4)
                for j, what in enumerate(("miss", "sensitivity"))
                for kind in explained
            },
            "margin_std": float(margins.std()),
        }


class _Regression:
    """Centred moments of one unit: input mean [d] and covariance [d, d], cross-covariance [d, 2], float64."""

    def __init__(self, moments: Moments) -> None:
        n = moments.count.clamp(min=1)
        self.mean, mean_y = moments.sum_x / n, moments.sum_y / n
        self.cov = moments.xx / n - torch.outer(self.mean, self.mean)
        self.cross = moments.xy / n - torch.outer(self.mean, mean_y)
        self.variance = (moments.sum_yy / n - mean_y.square()).clamp(min=1e-30)

    def ridge(self, output: int, strength: float) -> Tensor:
        scale = self.cov.diagonal().mean().clamp(min=1e-30) * strength
        identity = torch.eye(len(self.cov), dtype=self.cov.dtype, device=self.cov.device)
        return cast(Tensor, torch.linalg.solve(self.cov + scale * identity, self.cross[:, output]))

    def explained(self, output: int, weights: Tensor) -> float:
        gain = 2 * weights @ self.cross[:, output] - weights @ self.cov @ weights
        return float(gain / self.variance[output])


def _shift(margins: Tensor, units: list[int], others: Tensor, meter: BudgetMeter, target: float) -> float:
    """The constant that makes sampled decisions save `target`: bisection on the monotone expected saving.

    `margins` are of some `units`; `others` [all units] says what share of tokens the others approximate.
    """
    approximated = others.clone()
    low, high = float(margins.min()) - 20, float(margins.max()) + 20
    for _ in range(60):
        middle = (low + high) / 2
        approximated[units] = 1 - torch.sigmoid(margins - middle).mean(1)
        if float(meter.saved(approximated)) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
