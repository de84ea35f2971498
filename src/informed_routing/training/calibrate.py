"""Thresholds for many sparsities, found on text that training never saw.

A threshold changes what later layers see, so margins depend on it: each target is approached from its neighbour's
margins, and what the table stores is the sparsity measured at its threshold, not the one predicted. Only the rows below
the first and beyond the last target are measured on a part of the text and corrected for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.folder import ThresholdRow
from ..config.parts import Budget
from ..config.recipe import CalibrationConfig
from ..errors import InputError, WorkError
from ..progress import NullProgress, Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import Threshold
from ..routing.target import BudgetMeter

TOLERANCE = 0.015
"""How far from its target a row may be measured before it is placed once more: between rows the dial interpolates."""

PART = 4
"""Passes that only place a threshold read one row in this many."""

MARGIN = 0.02
"""How far below the attainable share targets must lie."""

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
    """The threshold table of a routed model from rows [n, L]: one row per target, and some below and beyond them.

    Targets that the routers cannot reach (a MACs budget has a ceiling) are left out.
    """
    progress = progress or NullProgress()
    text = _Text(model, rows, budget, config.batch_size)
    dense = text.measure(text.part, float("-inf"))
    ceiling = text.meter.attainable((dense.margins < torch.inf).float().mean(1))  # some tokens may always execute
    floor = max(getattr(dense.row, budget), 0.0)  # what static layers save
    targets = _between(config.targets, floor, ceiling)
    progress.stage("calibrate", len(targets))
    near = text.measure(text.part, _quantile(dense.margins, text.meter, targets[0]))
    found: list[_Measured] = []
    for done, target in enumerate(targets, start=1):
        near = text.reach(target, near)
        found.append(near)
        progress.advance(done, target=target, realised=getattr(near.row, budget))
    low = min(_lowest(one.margins) for one in (dense, *found)) - 1e-3
    table = [dense.row.model_copy(update={"threshold": low})]
    table += [one.row for one in found]
    # Margins have long tails: without these rows, low sparsities would be interpolated across the tail.
    table += [text.estimate(target, found[0]) for target in (floor + (targets[0] - floor) / part for part in (8, 2))]
    # The last target may be realised a little short; with a row behind it, the dial reaches it all the same.
    table.append(text.estimate(min(targets[-1] + BEYOND, (targets[-1] + ceiling) / 2), found[-1]))
    return tuple(sorted(table, key=lambda row: row.threshold))


def attainable(model: RoutedModelForCausalLM, meter: BudgetMeter, length: int) -> float:
    """The share saved when everything that may be approximated is, in rows of `length` tokens."""
    first = model.routing_config.selection.first_tokens
    share = max(length - first, 0) / length
    return meter.attainable(torch.tensor([1.0 if u.is_static else u.is_routed * share for u in model.units]))


def saved_always(model: RoutedModelForCausalLM, meter: BudgetMeter) -> float:
    """The share that static layers save whatever routers say, which those have to be paid from; 0 without any."""
    static = torch.tensor([float(unit.is_static) for unit in model.units])
    return meter.attainable(static) if bool(static.any()) else 0.0


def reachable(
    targets: Sequence[float], model: RoutedModelForCausalLM, meter: BudgetMeter, length: int
) -> tuple[float, ...]:
    """The targets that a calibration on rows of `length` tokens will keep; InputError where there are none."""
    return tuple(_between(targets, saved_always(model, meter), attainable(model, meter, length)))


def _lowest(margins: Tensor) -> float:
    """The lowest margin of a router: those of static units are infinite."""
    return float(margins[margins > -torch.inf].min())


def _between(targets: Sequence[float], floor: float, ceiling: float) -> list[float]:
    if not targets:
        raise InputError("calibration.targets is empty", "Give one share or more, such as [0.25], or leave it out")
    found = [target for target in targets if floor < target < ceiling - MARGIN]
    if not found and max(targets) <= floor:
        raise InputError(
            f"static layers save {floor:.2f} already, and the highest calibration target is {max(targets):g}",
            "Raise calibration.targets",
        )
    if not found:
        raise InputError(
            f"no calibration target is below the attainable {ceiling - MARGIN:.2f}: the lowest is {min(targets):g}",
            "Lower calibration.targets",
        )
    return found


class _Text:
    """Rows [n, L] to calibrate on, and a part of them for passes that need not be exact."""

    def __init__(self, model: RoutedModelForCausalLM, rows: Tensor, budget: Budget, batch_size: int) -> None:
        self.model, self.rows, self.part, self.budget, self.batch_size = model, rows, rows[::PART], budget, batch_size
        kinds, context = [unit.kind for unit in model.units], (rows.shape[1] + 1) / 2
        self.gains = model.routing_config.latency
        kv = model.routing_state.kv
        self.meter = BudgetMeter(model.costs, kinds, budget, context, self.gains, kv)
        self.macs = BudgetMeter(model.costs, kinds, "macs", context, kv=kv)
        self.attention = torch.tensor([kind == "attention" for kind in kinds])

    def measure(self, rows: Tensor, threshold: float) -> _Measured:
        return _measure(self.model, rows, threshold, self.batch_size)

    def reach(self, target: float, near: _Measured) -> _Measured:
        """All of the text, measured at a threshold that realises the target, from margins at another threshold."""
        # How much the new threshold shifts the share is found on the part; which share it gives otherwise, on all.
        place = _quantile(near.margins, self.meter, target)
        drift = self._drift(self.measure(self.part, place), near)
        measured = self.measure(self.rows, _quantile(near.margins, self.meter, target - drift))
        if abs(getattr(measured.row, self.budget) - target) > TOLERANCE:
            measured = self.measure(self.rows, self.propose(target, measured))
        return measured

    def propose(self, target: float, measured: _Measured) -> float:
        """The threshold for a target by the margins of one measurement, corrected for what they predict wrongly there.

        For `macs` that is, besides rounding, executed tokens that see more keys than the average one.
        """
        off = 0.0 if measured.row.threshold == float("-inf") else self._drift(measured, measured)
        return _quantile(measured.margins, self.meter, target - off)

    def estimate(self, target: float, near: _Measured) -> ThresholdRow:
        """The row of a target close to what was measured: the part's, corrected by how `near` tells it from all."""
        measured = self.measure(self.part, _quantile(near.margins, self.meter, target)).row
        whole = self._shares(near.margins, measured.threshold)
        part = self._shares(self._of_part(near.margins), measured.threshold)
        shares = {key: getattr(measured, key) + whole[key] - part[key] for key in whole}
        for key in ("units", "attention", "ffn"):
            shares[key] = min(max(shares[key], 0.0), 1.0)
        return ThresholdRow(threshold=measured.threshold, **shares)

    def _drift(self, measured: _Measured, near: _Measured) -> float:
        """How much a measured share differs from what the margins of `near` predict for the same tokens."""
        same = near.margins
        if same.shape != measured.margins.shape:
            same = self._of_part(same)
        return getattr(measured.row, self.budget) - _predicted(same, measured.row.threshold, self.meter)

    def _of_part(self, margins: Tensor) -> Tensor:
        return margins.unflatten(1, tuple(self.rows.shape))[:, ::PART].flatten(1)

    def _shares(self, margins: Tensor, threshold: float) -> dict[str, float]:
        """What margins predict at another threshold."""
        approximated = (margins <= threshold).float().mean(1)
        attention, ffn = float(approximated[self.attention].mean()), float(approximated[~self.attention].mean())
        return {
            "units": float(approximated.mean()),
            "attention": attention,
            "ffn": ffn,
            "macs": float(self.macs.saved(approximated)),
            "latency": self.gains.saved(attention, ffn) if self.gains else 0.0,
        }


def threshold_at(model: RoutedModelForCausalLM, rows: Tensor, target: float, budget: Budget) -> float:
    """One threshold, from three passes over rows [n, L]: each placed by the margins of the one before."""
    place = float("-inf")
    for _ in range(3):
        place, _ = realise(model, rows, target, budget, place)
    return place


def realise(
    model: RoutedModelForCausalLM, rows: Tensor, target: float, budget: Budget, threshold: float
) -> tuple[float, ThresholdRow]:
    """What `threshold` saves on rows [n, L], and the threshold that its margins propose for `target`; one pass."""
    text = _Text(model, rows, budget, 2)
    measured = text.measure(rows, threshold)
    return text.propose(target, measured), measured.row


def _measure(model: RoutedModelForCausalLM, rows: Tensor, threshold: float, batch_size: int) -> _Measured:
    state = model.routing_state
    model.eval()
    model.reset_routing_stats()
    collected: list[Tensor] = []
    with state.using(record_margins=True), model.deciding(Threshold(threshold)), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            model.hidden_states(rows[start : start + batch_size].to(model.device))
            collected.append(torch.stack([m.reshape(-1) for _, m in sorted(state.forward.margins.items())]).cpu())
    state.forward.margins.clear()
    margins = torch.cat(collected, dim=1)
    if bool(margins.isnan().any()):  # infinite ones are tokens that always execute
        unit = model.units[int(margins.isnan().any(1).nonzero()[0])]
        raise WorkError(
            f"calibration: margins are not finite in {str(model.dtype).removeprefix('torch.')}, first of the "
            f"{unit.kind} unit of layer {unit.index // 2}",
            "Use --dtype bfloat16 or float32",
        )
    stats, gains = model.routing_stats(), model.routing_config.latency
    model.reset_routing_stats()
    row = ThresholdRow(
        threshold=threshold,
        units=stats["units"],
        attention=stats["attention"],
        ffn=stats["ffn"],
        macs=stats["macs"],
        latency=gains.saved(stats["attention"], stats["ffn"]) if gains else 0.0,
    )
    return _Measured(margins, row)


def _predicted(margins: Tensor, threshold: float, meter: BudgetMeter) -> float:
    """What the meter expects to be saved at a threshold from margins [U, T]."""
    return float(meter.saved((margins <= threshold).float().mean(1)))


def _quantile(margins: Tensor, meter: BudgetMeter, target: float) -> float:
    """The threshold below which the margins' summed weights reach the target: a weighted quantile."""
    ordered, order = margins.reshape(-1).sort()
    weight = (meter.weights / margins.shape[1]).unsqueeze(1).expand_as(margins).reshape(-1)[order]
    saved = weight.double().cumsum(0) - meter.overhead
    place = int(torch.searchsorted(saved, torch.tensor(target, dtype=torch.float64)))
    place = max(place, int((ordered == -torch.inf).sum()))  # static units have no threshold
    return float(ordered[min(place, len(ordered) - 1)])
