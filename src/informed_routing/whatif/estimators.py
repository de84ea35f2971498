"""Estimators of E_P[Y] from a sample of Q, of log likelihood ratios log w = log p - log q.

All take `log_w` of shape [K, n] (or [n]) and outcomes `y` of shape [J, n] (or [n]) and give [K, J] (without the axes
that were left out), so that one call serves many targets and metrics. Nothing here knows where the ratios come from.
"""

from __future__ import annotations

import numpy as np

from .arrays import Floats, Ints


def ratios(log_w: Floats) -> Floats:
    """w itself; may overflow to inf."""
    with np.errstate(over="ignore"):
        return np.exp(log_w)


def clipped(log_w: Floats, boundary: Floats | float) -> Floats:
    """min(w, M). `boundary` is a number or one per target [K]."""
    return np.exp(np.minimum(log_w, np.log(_column(boundary, log_w))))


def zeroed(log_w: Floats, boundary: Floats | float) -> Floats:
    """w where w <= M, else 0."""
    kept = log_w <= np.log(_column(boundary, log_w))
    return np.where(kept, np.exp(np.where(kept, log_w, -np.inf)), 0.0)


def smoothed(log_w: Floats, mixing: float) -> Floats:
    """w / ((1 - l) + l w), at most 1 / l (Metelli et al. 2021)."""
    return 1.0 / ((1 - mixing) * np.exp(-np.maximum(log_w, -700.0)) + mixing) if mixing > 0 else ratios(log_w)


def weighted_mean(weights: Floats, y: Floats) -> Floats:
    """(1/n) sum of weights * y: the form of every estimator that does not divide by the weights."""
    return weights @ np.moveaxis(y, -1, 0) / y.shape[-1]


def likelihood_ratio(log_w: Floats, y: Floats) -> Floats:
    """The classical, unbiased estimator."""
    return weighted_mean(ratios(log_w), y)


def truncated(log_w: Floats, y: Floats, boundary: Floats | float) -> Floats:
    """With min(w, M) in place of w."""
    return weighted_mean(clipped(log_w, boundary), y)


def truncated_to_zero(log_w: Floats, y: Floats, boundary: Floats | float) -> Floats:
    """With w 1{w <= M} in place of w."""
    return weighted_mean(zeroed(log_w, boundary), y)


def truncated_product(log_w: Floats, y: Floats, boundary: float) -> Floats:
    """Truncates w |y| instead of w, for unbounded outcomes."""
    with np.errstate(divide="ignore"):
        log_size = log_w[..., None, :] + np.log(np.abs(y)) if y.ndim > 1 else log_w + np.log(np.abs(y))
    return (np.sign(y) * np.exp(np.minimum(log_size, np.log(boundary)))).mean(-1)


def self_normalised(log_w: Floats, y: Floats, boundary: Floats | float | None = None) -> Floats:
    """sum w y / sum w, with w truncated at `boundary` if it is given. NaN when all weights are zero."""
    if boundary is None:
        top = log_w.max(-1, keepdims=True)
        weights = np.exp(log_w - np.where(np.isfinite(top), top, 0.0))
    else:
        weights = clipped(log_w, boundary)
    return _normalised(weights, y)


def mass_corrected(log_w: Floats, y: Floats, boundary: Floats | float, lost_mass: Floats | float) -> Floats:
    """Truncated estimator, with the lost mass put at the self-normalised truncated mean."""
    weights = clipped(log_w, boundary)
    filled = np.asarray(lost_mass)
    filling = _normalised(weights, y)
    return weighted_mean(weights, y) + (filled[:, None] if filled.ndim and filling.ndim > 1 else filled) * filling


def control_variate(log_w: Floats, y: Floats) -> Floats:
    """mean(w y) - beta (mean(w) - 1), with beta = Cov(w y, w) / Var(w) from the sample."""
    w = ratios(log_w)
    mean_w = w.mean(-1, keepdims=True)
    classical, deviation = weighted_mean(w, y), w - mean_w
    variance = (deviation**2).mean(-1)
    covariance = weighted_mean(w * deviation, y)
    surplus = mean_w[..., 0] - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(variance > 0, surplus / variance, 0.0)
    return classical - covariance * (slope[..., None] if classical.ndim > slope.ndim else slope)


def post_stratified(stratum: Ints, y: Floats, target_weights: Floats) -> Floats:
    """sum over strata g of rho_g mean_g(y), for targets that differ from the nominal in stratum weights alone.

    `stratum` [n] numbers the strata from 0; `target_weights` is [K, G] or [G]. NaN where a target needs a stratum that
    the sample has not met.
    """
    groups = target_weights.shape[-1]
    counts = np.bincount(stratum, minlength=groups)
    sums = np.stack([np.bincount(stratum, weights=row, minlength=groups) for row in np.atleast_2d(y)])
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / counts
    missed = (np.atleast_2d(target_weights)[:, counts == 0] > 0).any(-1)
    estimate = np.atleast_2d(target_weights) @ np.nan_to_num(means).T
    estimate[missed] = np.nan
    estimate = estimate[:, 0] if y.ndim == 1 else estimate
    return estimate[0] if target_weights.ndim == 1 else estimate


def pareto_smoothed(log_w: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Self-normalised with Pareto-smoothed weights (Vehtari et al. 2024); also the shape k-hat of each target."""
    from arviz_stats.base import array_stats

    # arviz-stats expects log likelihoods and negates them inside: give it -log w
    log_smooth, khat = array_stats.psislw(-log_w, axis=-1)
    return self_normalised(np.asarray(log_smooth), y), np.asarray(khat)


def standard_error(weights: Floats, y: Floats, size: Floats | None = None) -> Floats:
    """Delta-method standard error of sum w y / sum w size (`size` one unless given): [K] for `weights` [K, n]."""
    size = np.ones_like(y) if size is None else size
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weights @ size
        estimate = (weights @ y) / total
        residual = y - estimate[..., None] * size
        return np.sqrt(((weights * residual) ** 2).sum(-1)) / total


def _normalised(weights: Floats, y: Floats) -> Floats:
    total = weights.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return weights @ np.moveaxis(y, -1, 0) / (total[..., None] if weights.ndim > 1 and y.ndim > 1 else total)


def _column(boundary: Floats | float, log_w: Floats) -> Floats:
    boundary = np.asarray(boundary, dtype=np.float64)
    return boundary[..., None] if boundary.ndim else boundary
