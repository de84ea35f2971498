"""Thresholds for many sparsities, found on text that training never saw.

A threshold changes what later layers see, so margins depend on it: each target is approached from its neighbour's
margins, and what the table stores is the sparsity measured at its threshold, not the one predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Budget, CalibrationConfig, ThresholdRow
from ..errors import InputError
from ..progress import NullProgress, Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.budget import BudgetMeter
from ..routing.decision import Threshold

TOLERANCE = 0.004
"""How far from its target a row may be measured before it is placed once more."""

BEYOND = 0.03
"""How far the table goes past the last target."""


@dataclass
class _Measured:
    margins: Tensor
    """[U, T] float32."""
    row: ThresholdRow


def calibrate(
    model: RoutedModelForCausalLM,
    rows: Tensor,
    config: CalibrationConfig,
    budget: Budget,
    progress: Progress | None = None,
) -> tuple[ThresholdRow, ...]:
    """The threshold table of a routed model from rows [n, L]: one row per target and one where nothing is approximated.

    Targets that the routers cannot reach (a MACs budget has a ceiling) are left out.
    """
    progress = progress or NullProgress()
    meter = BudgetMeter(model.costs, [u.kind for u in model.units], budget, (rows.shape[1] + 1) / 2)
    ceiling = meter.attainable()
    targets = [target for target in config.targets if target < ceiling - 0.02]
    if not targets:
        raise InputError(f"no calibration target is below the attainable {ceiling:.2f}", "Lower the targets")
    progress.stage("calibrate", len(targets))
    first = rows[: max(len(rows) // 4, 1)]
    low = float("-inf")
    measured = _measure(model, first, low, config.batch_size)
    floor = float(measured.margins.min()) - 1e-3
    table = [ThresholdRow(threshold=floor, units=0.0, attention=0.0, ffn=0.0, macs=measured.row.macs)]
    for target in (targets[0] / 8, targets[0] / 2):
        # Margins have long tails: without these rows, low sparsities would be interpolated across the tail.
        measured = _measure(model, first, _quantile(measured.margins, meter, target), config.batch_size)
        table.append(measured.row)
    part = first.numel()
    for done, target in enumerate(targets, start=1):
        # A new threshold changes what later layers see. How much that shifts the share is found on a part of the text;
        # which share a threshold gives otherwise, on all of it.
        place = _quantile(measured.margins, meter, target)
        guess = _measure(model, first, place, config.batch_size)
        drift = getattr(guess.row, budget) - _predicted(measured.margins[:, :part], place, meter)
        measured = _measure(model, rows, _quantile(measured.margins, meter, target - drift), config.batch_size)
        if abs(getattr(measured.row, budget) - target) > TOLERANCE:
            # For `macs` this also corrects for executed tokens that see more keys than the average one.
            off = getattr(measured.row, budget) - _predicted(measured.margins, measured.row.threshold, meter)
            measured = _measure(model, rows, _quantile(measured.margins, meter, target - off), config.batch_size)
        table.append(measured.row)
        progress.advance(done, target=target, realised=getattr(measured.row, budget))
    beyond = min(targets[-1] + BEYOND, (targets[-1] + ceiling) / 2)
    # The last target may be realised a little short; with a row behind it, the dial reaches it all the same.
    table.append(_measure(model, first, _quantile(measured.margins, meter, beyond), config.batch_size).row)
    return tuple(sorted(table, key=lambda row: row.threshold))


def threshold_at(model: RoutedModelForCausalLM, rows: Tensor, target: float, budget: Budget) -> float:
    """One threshold, from three passes over rows [n, L]: each placed by the margins of the one before."""
    place = float("-inf")
    for _ in range(3):
        place, _ = realise(model, rows, target, budget, place)
    return place


def realise(
    model: RoutedModelForCausalLM, rows: Tensor, target: float, budget: Budget, threshold: float
) -> tuple[float, ThresholdRow]:
    """What `threshold` saves on rows [n, L], and the threshold that its margins propose for `target`.

    One pass; the proposal corrects for what the meter predicts wrongly at the measured place.
    """
    meter = BudgetMeter(model.costs, [u.kind for u in model.units], budget, (rows.shape[1] + 1) / 2)
    measured = _measure(model, rows, threshold, 2)
    off = 0.0
    if threshold > float("-inf"):
        off = getattr(measured.row, budget) - _predicted(measured.margins, threshold, meter)
    return _quantile(measured.margins, meter, target - off), measured.row


def _measure(model: RoutedModelForCausalLM, rows: Tensor, threshold: float, batch_size: int) -> _Measured:
    state = model.routing_state
    model.eval()
    model.reset_routing_stats()
    state.record_margins = True
    collected: list[Tensor] = []
    try:
        with model.deciding(Threshold(threshold)), torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                model.hidden_states(rows[start : start + batch_size].to(model.device))
                collected.append(torch.stack([m.reshape(-1) for _, m in sorted(state.margins.items())]).cpu())
    finally:
        state.record_margins = False
        state.margins.clear()
    stats = model.routing_stats()
    model.reset_routing_stats()
    row = ThresholdRow(
        threshold=threshold,
        units=stats["units"],
        attention=stats["attention"],
        ffn=stats["ffn"],
        macs=stats["macs"],
    )
    return _Measured(torch.cat(collected, dim=1), row)


def _predicted(margins: Tensor, threshold: float, meter: BudgetMeter) -> float:
    """What the meter expects to be saved at a threshold from margins [U, T]."""
    return float(meter.saved((margins <= threshold).float().mean(1)))


def _quantile(margins: Tensor, meter: BudgetMeter, target: float) -> float:
    """The threshold below which the margins' summed weights reach the target: a weighted quantile."""
    ordered, order = margins.reshape(-1).sort()
    weight = (meter.weights / margins.shape[1]).unsqueeze(1).expand_as(margins).reshape(-1)[order]
    saved = weight.double().cumsum(0) - meter.overhead
    place = int(torch.searchsorted(saved, torch.tensor(target, dtype=torch.float64)))
    return float(ordered[min(place, len(ordered) - 1)])
