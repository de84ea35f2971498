"""Thresholds for many sparsities, found on text that training never saw.

Margins shift over the first tokens of a text, so each range of contexts gets thresholds of its own, at which it
realises each target. A threshold changes what later layers see, so margins depend on it: each target is approached
from its neighbour's margins, and what the table stores is the sparsity measured at its thresholds, not the one
predicted. Only the rows below the first and beyond the last target are measured on a part of the text and corrected
for the rest, and a row's one threshold for all contexts, which earlier versions read, is placed by its pass's margins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config.folder import ThresholdRow
from ..config.parts import Budget
from ..config.recipe import CalibrationConfig
from ..errors import InputError
from ..progress import NullProgress, Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import Threshold
from ..routing.target import BudgetMeter
from .margins import Measured, measure, predicted, quantile, ranges_of

TOLERANCE = 0.015
"""How far from its target a row may be measured before it is placed once more: between rows the dial interpolates."""

ATTEMPTS = 3
"""How often at most."""

PART = 4
"""Passes that only place a threshold read one row in this many."""

MARGIN = 0.02
"""How far below the attainable share targets must lie."""

BEYOND = 0.03
"""How far the table goes past the last target."""


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
    text = _Text(model, rows, budget, config.batch_size, split=True)
    dense = text.measure(text.part, text.everywhere(float("-inf")))
    ceiling = text.meter.attainable((dense.margins < torch.inf).float().mean(1))  # some tokens may always execute
    floor = max(getattr(dense.row, budget), 0.0)  # what static layers save
    targets = _between(config.targets, floor, ceiling)
    progress.stage("calibrate", len(targets))
    near = text.measure(text.part, text.place(dense.margins, targets[0]))
    found: list[Measured] = []
    for done, target in enumerate(targets, start=1):
        near = text.reach(target, near)
        found.append(near)
        progress.advance(done, target=target, realised=getattr(near.row, budget))
    low = text.everywhere(min(_lowest(one.margins) for one in (dense, *found)) - 1e-3)
    table = [dense.row.model_copy(update={"threshold": low.value, "by_context": low.by_context})]
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

    def __init__(
        self, model: RoutedModelForCausalLM, rows: Tensor, budget: Budget, batch_size: int, *, split: bool
    ) -> None:
        self.model, self.rows, self.part, self.budget, self.batch_size = model, rows, rows[::PART], budget, batch_size
        self.length = rows.shape[1]
        # Keys read by ranges are not counted where some are dropped.
        self.ranges = ranges_of(model, self.length, budget, split=split and model.routing_state.kv == "keep")
        (self.whole,) = ranges_of(model, self.length, budget, split=False)
        (macs,) = ranges_of(model, self.length, "macs", split=False)
        self.meter, self.macs = self.whole.meter, macs.meter
        self.gains = model.routing_config.latency
        self.attention = torch.tensor([unit.kind == "attention" for unit in model.units])

    def measure(self, rows: Tensor, rule: Threshold) -> Measured:
        return measure(self.model, rows, rule, self.ranges, self.budget, self.batch_size)

    def rule(self, thresholds: Sequence[float], value: float) -> Threshold:
        """A threshold for each range, and the one for all that is nearest to them."""
        if len(self.ranges) == 1:
            return Threshold(thresholds[0])
        return Threshold(value, tuple((part.low + 1, t) for part, t in zip(self.ranges, thresholds, strict=True)))

    def everywhere(self, threshold: float) -> Threshold:
        """The same threshold in all ranges."""
        return self.rule([threshold] * len(self.ranges), threshold)

    def place(self, margins: Tensor, target: float, drifts: Sequence[float] | None = None) -> Threshold:
        """Where margins [U, T] alone say that the target is met in each range, if a share drifts by so much there."""
        drifts = drifts or [0.0] * len(self.ranges)
        found = [
            quantile(part.of(margins, self.length), part.meter, target - drift)
            for part, drift in zip(self.ranges, drifts, strict=True)
        ]
        return self.rule(found, quantile(margins, self.meter, target - sum(drifts) / len(drifts)))

    def reach(self, target: float, near: Measured) -> Measured:
        """All of the text, measured where the target is realised in each range, from margins under another rule."""
        # How much the new thresholds shift the share is found on the part; which share they give otherwise, on all.
        place = self.place(near.margins, target)
        drifts = self._drifts(self.measure(self.part, place), near)
        measured = self.measure(self.rows, self.place(near.margins, target, drifts))
        for _ in range(ATTEMPTS):  # where much is approximated, each shift of a threshold moves margins further away
            if max(abs(saved - target) for saved in measured.saved) <= TOLERANCE:
                break
            measured = self.measure(self.rows, self.propose(target, measured))
        return self._with_one_for_all(target, measured)

    def propose(self, target: float, measured: Measured) -> Threshold:
        """The rule for a target by the margins of one measurement, corrected for what they predict wrongly there.

        For `macs` that is, besides rounding, executed tokens that see more keys than the average one.
        """
        off = None if measured.rule.value == float("-inf") else self._drifts(measured, measured)
        return self.place(measured.margins, target, off)

    def estimate(self, target: float, near: Measured) -> ThresholdRow:
        """The row of a target close to what was measured: the part's, corrected by how `near` tells it from all."""
        rule = self.place(near.margins, target)
        measured = self.measure(self.part, rule).row
        whole, part = self._shares(near.margins, rule), self._shares(self._of_part(near.margins), rule)
        shares = {key: getattr(measured, key) + whole[key] - part[key] for key in whole}
        for key in ("units", "attention", "ffn"):
            shares[key] = min(max(shares[key], 0.0), 1.0)
        by_unit = torch.tensor(measured.by_unit) + self._by_unit(near.margins, rule)
        by_unit -= self._by_unit(self._of_part(near.margins), rule)
        held = tuple(round(float(share), 5) for share in by_unit.clamp(0, 1))
        return ThresholdRow(threshold=rule.value, by_context=rule.by_context, by_unit=held, **shares)

    def _with_one_for_all(self, target: float, measured: Measured) -> Measured:
        """The same with the one threshold for all contexts that realises as much of the text as a whole."""
        if len(self.ranges) == 1:
            return measured
        limits = self._limits(measured.rule, measured.margins)
        off = getattr(measured.row, self.budget) - predicted(measured.margins, limits, self.meter)
        value = quantile(measured.margins, self.meter, getattr(measured.row, self.budget) - off)
        row = measured.row.model_copy(update={"threshold": value, "by_context": measured.rule.by_context})
        return replace(measured, row=row, rule=replace(measured.rule, value=value))

    def _drifts(self, measured: Measured, near: Measured) -> list[float]:
        """How much measured shares differ from what the margins of `near` predict for the same tokens, by range."""
        same = near.margins
        if same.shape != measured.margins.shape:
            same = self._of_part(same)
        thresholds = [t for _, t in measured.rule.by_context] or [measured.rule.value]
        return [
            saved - predicted(part.of(same, self.length), threshold, part.meter)
            for part, saved, threshold in zip(self.ranges, measured.saved, thresholds, strict=True)
        ]

    def _of_part(self, margins: Tensor) -> Tensor:
        return margins.unflatten(1, tuple(self.rows.shape))[:, ::PART].flatten(1)

    def _limits(self, rule: Threshold, margins: Tensor) -> Tensor:
        """The threshold of each token of margins [U, T]: [T]."""
        return rule.limits(torch.arange(1, self.length + 1)).repeat(margins.shape[1] // self.length)

    def _by_unit(self, margins: Tensor, rule: Threshold) -> Tensor:
        """Share of tokens that each unit would approximate: [U]."""
        return (margins <= self._limits(rule, margins)).float().mean(1)

    def _shares(self, margins: Tensor, rule: Threshold) -> dict[str, float]:
        """What margins predict under another rule."""
        approximated = self._by_unit(margins, rule)
        attention, ffn = float(approximated[self.attention].mean()), float(approximated[~self.attention].mean())
        return {
            "units": float(approximated.mean()),
            "attention": attention,
            "ffn": ffn,
            "macs": float(self.macs.saved(approximated)),
            "latency": self.gains.saved(attention, ffn) if self.gains else 0.0,
        }


def threshold_at(model: RoutedModelForCausalLM, rows: Tensor, target: float, budget: Budget) -> float:
    """One threshold for all contexts, from three passes over rows [n, L], each placed by the one before."""
    place = float("-inf")
    for _ in range(3):
        place, _ = realise(model, rows, target, budget, place)
    return place


def realise(
    model: RoutedModelForCausalLM, rows: Tensor, target: float, budget: Budget, threshold: float
) -> tuple[float, ThresholdRow]:
    """What `threshold` saves on rows [n, L], and the threshold that its margins propose for `target`; one pass."""
    text = _Text(model, rows, budget, 2, split=False)
    measured = text.measure(rows, Threshold(threshold))
    return text.propose(target, measured).value, measured.row
