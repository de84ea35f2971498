"""What `predict` gives: one row per target and metric."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..finite import written
from .diagnostics import Colour


@dataclass(frozen=True)
class Prediction:
    """One metric at one target. NaN: not defined for this metric. All values are in the metric's own units."""

    target: str
    metric: str
    estimate: float | None  # None when red: use the interval, or measure
    estimator: str  # "truncated self-normalised", or "post-stratified" when only domain weights differ
    standard_error: float  # of the estimate, by the delta method; trust it when green
    lower: float  # limits that hold for all rows together with probability 1 - delta
    upper: float
    likelihood_ratio: float  # the classical estimator, for comparison
    truncated_self_normalised: float
    mass_corrected: float
    truncation: float  # M
    lost_mass: float  # tau_M, exact, with what lies outside
    outside: float  # target mass where the nominal workload has none
    d2: float  # exact E_Q[w^2], the exponential of the Renyi divergence of order 2
    kl: float  # exact, nats
    ess: float  # measured effective sample size
    exact_ess: float  # n / d2
    khat_weights: float  # tail shape of w; -inf: no tail
    khat_metric: float  # tail shape of w |Y - estimate|
    mass_z: float  # standard errors by which the mean weight is off
    top_share: float  # share of the weight in the largest 1% of the sample
    clipped: float  # share of the prompts whose value was cut to the metric's bounds
    colour: Colour
    reasons: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Predictions:
    """All rows, targets first, and what they were made with."""

    rows: tuple[Prediction, ...]
    prompts: int
    delta: float
    seed: int

    def row(self, target: str, metric: str) -> Prediction:
        """That of one target and metric. Raises KeyError."""
        for row in self.rows:
            if (row.target, row.metric) == (target, metric):
                return row
        raise KeyError((target, metric))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not defined are left out, infinite ones written as "Infinity"."""
        rows = [
            {key: _plain(value) for key, value in asdict(row).items() if not _undefined(value)} for row in self.rows
        ]
        return {"prompts": self.prompts, "delta": self.delta, "seed": self.seed, "rows": rows}


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return written(value)
    return list(value) if isinstance(value, tuple) else value
