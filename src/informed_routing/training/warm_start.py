"""Closed-form start of the routers: regress each margin on the token's measured recoverability.

Two things make a token worth executing: how far the forecast misses (predictable from the router's own input), and
how much the loss minds a miss of this unit. The first is each token's squared forecast error, relative to the size of
the residual stream that later norms divide by; its logarithm is fitted by ridge regression. The second is the unit's
mean squared gradient of the loss along the miss, dL/dgate = <dL/dh, update - forecast>, from a few backward passes of
the dense model. Their sum, in logarithms, orders tokens across all units on one scale; it becomes the margin. The paper
starts routers at random; here stage 2 starts near a good router, and a short stage 2 is enough.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..config import ObjectiveConfig
from ..progress import Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.budget import BudgetMeter
from ..routing.forecaster import Moments, solve
from ..routing.routed_unit import Observation
from .objectives import lm_head, next_token_loss

MARGIN_SCALE = 1.5
"""Margin per unit of log importance: decided enough that sampling is not noise, soft enough to learn from."""

RIDGE = 3e-2


class _Probe:
    """Executes everything and keeps each gate as a leaf, so that backward leaves dL/dgate on it."""

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.ones(logits.shape[:-1], device=logits.device).requires_grad_()


def warm_start(
    model: RoutedModelForCausalLM,
    rows: Tensor,
    meter: BudgetMeter,
    target: float,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Write closed-form margins into all routers from rows [n, L]; sampling then realises `target` at the start.

    Returns the explained share of the log errors (mean over attention and ffn units). An MLP router carries the
    regression in a pair of ReLU units of opposite sign.
    """
    units = model.units
    state = model.routing_state
    width = model.routing_config.hidden_size
    errors = [_LogErrors(width, model.device) for _ in units]
    squares = torch.zeros(len(units))
    head = lm_head(model)
    count = 0

    observed: set[int] = set()

    def observer(seen: Observation) -> None:
        if seen.index in observed:  # recomputation under activation checkpointing
            return
        observed.add(seen.index)
        with torch.no_grad():
            x, y = seen.x.reshape(-1, width).float(), seen.output.reshape(-1, width).float()
            forecaster = units[seen.index].forecaster
            miss = y if forecaster is None else y - forecaster(x).float()
            size = miss.square().sum(-1) * seen.relative_weight[:, 0]
            errors[seen.index].add(x, size.clamp(min=1e-20).log())

    model.train()
    state.observer = observer
    probed: list[Tensor] = []
    try:
        with model.deciding(_Probe()):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size].to(model.device)
                observed.clear()
                hidden = model.hidden_states(batch)
                loss = next_token_loss(hidden, batch, head, ObjectiveConfig(), reduction="sum")
                gates = [state.gates[i] for i in range(len(units))]
                gradients = torch.autograd.grad(loss, gates)
                squares += torch.stack([g.float().square().sum() for g in gradients]).cpu()
                count += batch.numel()
                if progress is not None:
                    progress.advance(min(start + batch_size, len(rows)))
                probed = [e.x for e in errors]
    finally:
        state.observer = None
        model.eval()
    importance = (squares / count).clamp(min=1e-20).log()
    fits = [e.fit() for e in errors]
    margins = torch.stack(
        [x @ w + importance[i] - mean @ w for i, (x, (w, mean, _)) in enumerate(zip(probed, fits, strict=True))]
    )
    shift = _shift(margins * MARGIN_SCALE, meter, target)
    for i, (unit, (w, mean, _)) in enumerate(zip(units, fits, strict=True)):
        constant = (importance[i] - mean @ w) * MARGIN_SCALE - shift
        _write(unit.router, w * MARGIN_SCALE, float(constant))
    explained = [f[2] for f in fits]
    return {
        "log_error_explained_attention": sum(explained[0::2]) / len(explained[0::2]),
        "log_error_explained_ffn": sum(explained[1::2]) / len(explained[1::2]),
        "margin_std": float((margins * MARGIN_SCALE).std()),
    }


class _LogErrors:
    """Moments of (input, log squared forecast error) of one unit."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.moments = Moments(width, device, outputs=1)
        self.x = torch.zeros(0, width)

    def add(self, x: Tensor, log_error: Tensor) -> None:
        self.moments.add(x, log_error.unsqueeze(-1))
        self.x = x.cpu()  # the last batch is enough to place the margins

    def fit(self) -> tuple[Tensor, Tensor, float]:
        """Ridge weights [d], mean input [d], explained share."""
        found = solve(self.moments, RIDGE)
        weights = (found.outer[0, :1] * found.inner[0]).cpu()
        mean = (self.moments.sum_x / self.moments.count).float().cpu()
        return weights, mean, float(found.explained[0])


def _shift(margins: Tensor, meter: BudgetMeter, target: float) -> float:
    """The constant that makes sampled decisions save `target`: bisection on the monotone expected saving."""
    low, high = float(margins.min()) - 20, float(margins.max()) + 20
    for _ in range(60):
        middle = (low + high) / 2
        approximated = 1 - torch.sigmoid(margins - middle).mean(1)
        if float(meter.saved(approximated)) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _write(router: nn.Module, weights: Tensor, constant: float) -> None:
    """Add the linear margin w x + c to a router, split evenly over the two logits."""
    outer = cast(nn.Linear, router.outer)
    inner = cast("nn.Linear | None", router.inner)
    with torch.no_grad():
        outer.bias.copy_(torch.tensor([-0.5, 0.5]) * constant)
        if inner is None:
            outer.weight.copy_(torch.stack([-0.5 * weights, 0.5 * weights]))
            return
        # Share the scale between the layers, so that both learn at the same pace.
        norm = float(weights.norm().clamp(min=1e-12))
        half = norm**0.5
        signs = [1.0, -1.0] if getattr(router, "kind", "") == "mlp" and inner.out_features > 1 else [1.0]
        for row, sign in enumerate(signs):
            inner.weight[row].copy_(sign * weights / norm * half)
            inner.bias[row].zero_()
            outer.weight[:, row].copy_(torch.tensor([-0.5, 0.5]) * sign * half)
