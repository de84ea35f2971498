"""One pass over calibration text: the margins of all tokens, and what a rule saves in each range of contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.folder import ThresholdRow
from ..config.parts import Budget
from ..errors import WorkError
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import Threshold
from ..routing.stats import RoutingStats
from ..routing.target import BudgetMeter

CONTEXTS = (1, 17, 33, 65, 129, 257, 513, 1025)
"""Where ranges of contexts begin that get thresholds of their own: margins shift most over a text's first tokens."""

FULL = 0.75
"""A range needs calibration rows that reach a third beyond its beginning; tokens that see more are decided as there."""


@dataclass(frozen=True)
class Range:
    """The places low .. high - 1 of each calibration row, whose tokens share a threshold."""

    low: int
    high: int
    meter: BudgetMeter

    def of(self, margins: Tensor, length: int) -> Tensor:
        """Margins [U, T] of rows of `length` tokens, of the tokens in this range: [U, t]."""
        return margins.unflatten(1, (-1, length))[:, :, self.low : self.high].flatten(1)


@dataclass
class Measured:
    """What one pass found."""

    margins: Tensor
    """[U, T] float32, of all rows one after another."""
    rule: Threshold
    row: ThresholdRow
    """Shares of all tokens."""
    saved: tuple[float, ...]
    """The budget's share in each range."""


def ranges_of(model: RoutedModelForCausalLM, length: int, budget: Budget, *, split: bool) -> tuple[Range, ...]:
    """The ranges of contexts that rows of `length` tokens calibrate: `split`, or all in one."""
    begins = [1] if not split else [begin for begin in CONTEXTS if begin == 1 or begin <= FULL * length]
    kinds, config = [unit.kind for unit in model.units], model.routing_config
    found = []
    for first, last in zip(begins, [begin - 1 for begin in begins[1:]] + [length], strict=True):
        context = (first + last) / 2
        meter = BudgetMeter(model.costs, kinds, budget, context, config.latency, model.routing_state.kv)
        found.append(Range(first - 1, last, meter))
    return tuple(found)


def measure(
    model: RoutedModelForCausalLM, rows: Tensor, rule: Threshold, ranges: tuple[Range, ...], budget: Budget, batch: int
) -> Measured:
    """One pass over rows [n, L] under a rule. Raises WorkError for margins that are no numbers."""
    state, gains = model.routing_state, model.routing_config.latency
    model.eval()
    model.reset_routing_stats()
    counts = [RoutingStats.empty(model.costs, model.stats.kinds) for _ in ranges] if len(ranges) > 1 else []
    collected: list[Tensor] = []
    with state.using(record_margins=True), model.deciding(rule), torch.inference_mode():
        for start in range(0, len(rows), batch):
            model.hidden_states(rows[start : start + batch].to(model.device))
            collected.append(torch.stack([m.reshape(-1) for _, m in sorted(state.forward.margins.items())]).cpu())
            for part, count in zip(ranges, counts, strict=False):
                count.add(state, _within(part, state.forward.contexts))
    state.forward.margins.clear()
    margins = torch.cat(collected, dim=1)
    if bool(margins.isnan().any()):  # infinite ones are tokens that always execute
        unit = model.units[int(margins.isnan().any(1).nonzero()[0])]
        raise WorkError(
            f"calibration: margins are not finite in {str(model.dtype).removeprefix('torch.')}, first of the "
            f"{unit.kind} unit of layer {unit.index // 2}",
            "Use --dtype bfloat16 or float32",
        )
    whole = model.stats
    model.reset_routing_stats()
    row = shares_of(whole, rule.value, gains)
    saved = tuple(getattr(shares_of(one, rule.value, gains), budget) for one in counts)
    return Measured(margins, rule, row, saved or (getattr(row, budget),))


def _within(part: Range, contexts: Tensor | None) -> Tensor:
    """Contexts [B, N] of the tokens of a range, 0 for all others."""
    assert contexts is not None
    found = torch.zeros_like(contexts)
    found[:, part.low : part.high] = contexts[:, part.low : part.high]
    return found


def shares_of(stats: RoutingStats, threshold: float, gains: object) -> ThresholdRow:
    """What counted tokens realised, as a row of the table."""
    attention, ffn = stats.shares("attention"), stats.shares("ffn")
    latency = gains.saved(attention, ffn) if gains is not None else 0.0  # type: ignore[attr-defined]
    return ThresholdRow(
        threshold=threshold,
        units=stats.shares(),
        attention=attention,
        ffn=ffn,
        macs=stats.saved(),
        latency=latency,
        by_unit=stats.shares_by_unit(),
    )


def predicted(margins: Tensor, threshold: float | Tensor, meter: BudgetMeter) -> float:
    """What the meter expects to be saved from margins [U, T] at one threshold, or at one for each token [T]."""
    return float(meter.saved((margins <= threshold).float().mean(1)))


def quantile(margins: Tensor, meter: BudgetMeter, target: float) -> float:
    """The threshold below which the margins' summed weights reach the target: a weighted quantile.

    Never infinite: what always executes, and static layers, have no threshold.
    """
    ordered, order = margins.reshape(-1).sort()
    weight = (meter.weights / margins.shape[1]).unsqueeze(1).expand_as(margins).reshape(-1)[order]
    saved = weight.double().cumsum(0) - meter.overhead
    place = int(torch.searchsorted(saved, torch.tensor(target, dtype=torch.float64)))
    first, count = int((ordered == -torch.inf).sum()), int(ordered.isfinite().sum())
    return float(ordered[max(min(place, first + count - 1), first)]) if count else 0.0
