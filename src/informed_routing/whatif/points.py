"""Estimates, errors and limits of one metric at several targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import diagnostics
from .arrays import Floats
from .intervals import Truncation, quantile_interval, ratio_interval
from .metrics import Outcome, Ranking
from .strata import stratified_error
from .weights import ratios, standard_error
from .workloads import AnyWorkload, Inputs


@dataclass(frozen=True)
class Divergence:
    """Exact facts of one target, at one sample size and level."""

    boundary: float
    lost_mass: float
    second_moment: float
    d2: float
    kl: float
    outside: float

    def worth(self, prompts: int) -> float:
        """As how many prompts of the target a nominal sample counts: n / d2; none where the nominal has no mass."""
        return prompts / self.d2 if self.d2 > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """Some targets with their weights on the sample.

    For ratios per token the targets count each prompt by its tokens; log_w, divergences and all else are then of these.
    """

    inputs: Inputs
    targets: Sequence[AnyWorkload]
    divergences: Sequence[Divergence]
    log_w: Floats  # [K, n]
    weights: Floats  # [K, n], min(w, M)
    point_weights: Floats  # [K, n], the same, or post-stratified
    units: Floats  # [n], by what the targets count each prompt
    shares: list[dict[str, float] | None]  # [K], target weights of the domains where only these differ
    truncation: Truncation
    mean_tokens: Floats  # [K]

    @cached_property
    def ess(self) -> Floats:
        """Effective sample size: [K]."""
        return diagnostics.effective_sample_size(self.log_w)

    @cached_property
    def top_share(self) -> Floats:
        """Part of the weight in the largest 1%: [K]."""
        return diagnostics.top_share(self.log_w)

    @cached_property
    def mass_z(self) -> Floats:
        """Standard errors by which the mean weight is off: [K]."""
        outside = np.array([exact.outside for exact in self.divergences])
        return diagnostics.mass_check(self.weights, self.truncation.lost_mass - outside)

    @cached_property
    def khat(self) -> Floats:
        """Tail shape of the weights: [K]."""
        return diagnostics.pareto_shape(self.log_w)


@dataclass(frozen=True)
class Points:
    """One metric at the targets of a chunk, in the metric's own units: [K] each."""

    estimate: Floats
    standard_error: Floats
    lower: Floats
    upper: Floats
    likelihood_ratio: Floats
    truncated: Floats
    mass_corrected: Floats
    khat: Floats
    clipped: float
    scale: Floats  # the metric's range


def mean_points(chunk: Chunk, outcome: Outcome, each: float) -> Points:
    """Of a mean, a total, a ratio or a tail probability; limits at level `each`."""
    part, size, weights, n = outcome.part, outcome.size, chunk.weights, len(outcome.part)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        w = ratios(chunk.log_w)
        truncated = weights @ part / (weights @ size)
        estimate = chunk.point_weights @ part / (chunk.point_weights @ size)
        error = standard_error(chunk.point_weights, part, size)
        if not outcome.by_tokens:
            classical = w @ part / n
            corrected = weights @ part / n + chunk.truncation.lost_mass * truncated
        else:  # filling the lost mass with the mean of the rest changes both sums alike
            classical, corrected = w @ part / (w @ size), truncated
    for row, share in enumerate(chunk.shares):
        if share is not None:
            sums = (part * chunk.units, size * chunk.units)
            error[row] = stratified_error(share, chunk.inputs, *sums, float(estimate[row]))
    lower, upper = ratio_interval(weights, part, size, chunk.truncation, each)
    unit = chunk.mean_tokens if outcome.total else np.ones(len(estimate))
    offset, scale = outcome.offset * unit, outcome.scale * unit
    return Points(
        estimate=offset + scale * estimate,
        standard_error=scale * error,
        lower=offset + scale * lower,
        upper=offset + scale * upper,
        likelihood_ratio=offset + scale * classical,
        truncated=offset + scale * truncated,
        mass_corrected=offset + scale * corrected,
        khat=_shape(chunk.log_w, part - np.nan_to_num(estimate)[:, None] * size),
        clipped=outcome.clipped,
        scale=scale,
    )


def quantile_points(chunk: Chunk, ranking: Ranking, each: float) -> Points:
    """Of a quantile; the classical estimator and its correction have no counterpart here."""
    order = np.argsort(ranking.values, kind="stable")
    sorted_values = ranking.values[order]
    estimate = _weighted_quantile(sorted_values, chunk.point_weights[:, order], ranking.level)
    above = (ranking.values > estimate[:, None]).astype(np.float64) - (1 - ranking.level)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(((chunk.point_weights * above) ** 2).sum(1)) / chunk.point_weights.sum(1)
    # Woodruff: the quantiles one standard error of the level to either side
    low, high = (
        _weighted_quantile(sorted_values, chunk.point_weights[:, order], np.clip(ranking.level + step, 0, 1))
        for step in (-error, error)
    )
    lower, upper = quantile_interval(chunk.weights, ranking.values, ranking.level, chunk.truncation, each)
    undefined = np.full_like(estimate, np.nan)
    return Points(
        estimate=estimate,
        standard_error=(high - low) / 2,
        lower=lower,
        upper=upper,
        likelihood_ratio=undefined,
        truncated=_weighted_quantile(sorted_values, chunk.weights[:, order], ranking.level),
        mass_corrected=undefined,
        khat=_shape(chunk.log_w, above),
        clipped=0.0,
        scale=np.full_like(estimate, float(np.ptp(sorted_values)) or 1.0),
    )


def _weighted_quantile(sorted_values: Floats, weights: Floats, level: Floats | float) -> Floats:
    """The smallest value with at least `level` of the weight at or below it: [K]; NaN without weight."""
    mass = np.cumsum(weights, axis=1)
    at = (mass < np.asarray(level * mass[:, -1])[:, None]).sum(1)
    return np.where(mass[:, -1] > 0, sorted_values[np.minimum(at, len(sorted_values) - 1)], np.nan)


def _shape(log_w: Floats, residual: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return diagnostics.pareto_shape(log_w + np.log(np.abs(residual)))
