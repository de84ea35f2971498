"""From a sparsity that a user asks for to the margin threshold that realises it."""

from __future__ import annotations

import math

from ..config.folder import ByContext, RoutingConfig, ThresholdRow
from ..config.parts import Budget
from ..errors import InputError

RANGE_SLACK = 0.005
"""How far above the last measured share a sparsity may lie: targets are met to a fraction of a point."""


def threshold_for(config: RoutingConfig, sparsity: float, budget: Budget | None = None) -> float:
    """The margin threshold that realises a sparsity, by interpolation in the calibrated table."""
    (low, high), part = _between(config, sparsity, budget)
    return low.threshold + part * (high.threshold - low.threshold)


def thresholds_by_context(config: RoutingConfig, sparsity: float, budget: Budget | None = None) -> ByContext:
    """The same for each range of contexts; empty where the table has one threshold for all."""
    (low, high), part = _between(config, sparsity, budget)
    contexts = [context for context, _ in low.by_context or high.by_context]
    first, second = (
        [threshold for _, threshold in row.by_context] or [row.threshold] * len(contexts) for row in (low, high)
    )
    return tuple((c, a + part * (b - a)) for c, a, b in zip(contexts, first, second, strict=True))


def shares_by_unit(config: RoutingConfig, sparsity: float, budget: Budget | None = None) -> tuple[float, ...]:
    """The share of tokens that each unit approximated of the calibration text at a sparsity.

    Raises InputError where the table does not say, which those of earlier versions do not.
    """
    (low, high), part = _between(config, sparsity, budget)
    if not (low.by_unit and high.by_unit):
        raise InputError(
            "the threshold table has no shares of single units: it is of an earlier version",
            "Make a new one: informed-routing calibrate DIR --data TEXT --out NEW",
        )
    return tuple(a + part * (b - a) for a, b in zip(low.by_unit, high.by_unit, strict=True))


def _between(
    config: RoutingConfig, sparsity: float, budget: Budget | None
) -> tuple[tuple[ThresholdRow, ThresholdRow], float]:
    """The two rows of the table that a sparsity lies between, and how far it is from the first to the second."""
    budget = budget or config.budget
    if budget == "latency" and config.latency is None:
        raise InputError("this routing has no measured latency table", "Use units or macs, or fit with budget latency")
    rows = sorted(config.thresholds, key=lambda row: getattr(row, budget))
    if not rows:
        raise InputError("the routing has not been calibrated", "Run `fit` to the end, or training.calibrate")
    shares = [getattr(row, budget) for row in rows]
    if config.selection.static_layers:
        if sparsity < shares[0] - RANGE_SLACK:
            raise InputError(
                f"sparsity {sparsity} is less than the {shares[0]:.3f} ({budget}) that the static layers save already",
                "Choose that or more, or 0 for the original model",
            )
        sparsity = max(sparsity, shares[0])
    if not shares[0] <= sparsity <= shares[-1] + RANGE_SLACK:
        raise InputError(
            f"sparsity {sparsity} is outside the calibrated range {max(shares[0], 0):.3f} to "
            f"{shares[-1]:.3f} ({budget})",
            "Choose a value inside, or fit with higher calibration targets",
        )
    for (low, row), (high, following) in zip(
        zip(shares, rows, strict=True), zip(shares[1:], rows[1:], strict=True), strict=False
    ):
        if low <= sparsity <= high:
            part = 0.0 if math.isclose(low, high) else (sparsity - low) / (high - low)
            return (row, following), part
    return (rows[-1], rows[-1]), 0.0  # a hair above the last measured share
