"""Estimators of E_P[Y] from a sample of Q, of log likelihood ratios log w = log p - log q.

All take `log_w` of shape [K, n] (or [n]) and outcomes `y` of shape [J, n] (or [n]) and give [K, J] (without the axes
that were left out), so that one call serves many targets and metrics.
"""

from __future__ import annotations

import numpy as np

from ....whatif.arrays import Floats, Ints
from ....whatif.weights import ratios


def likelihood_ratio(log_w: Floats, y: Floats) -> Floats:
    """The classical, unbiased estimator."""
    return ratios(log_w) @ np.moveaxis(y, -1, 0) / y.shape[-1]


def self_normalised(log_w: Floats, y: Floats) -> Floats:
    """sum w y / sum w. NaN when all weights are zero."""
    top = log_w.max(-1, keepdims=True)
    weights = np.exp(log_w - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return weights @ np.moveaxis(y, -1, 0) / (total[..., None] if weights.ndim > 1 and y.ndim > 1 else total)


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
