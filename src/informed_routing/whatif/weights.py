"""Weights of a sample of Q that stand for another law P, from log likelihood ratios log w = log p - log q: [K, n]."""

from __future__ import annotations

import numpy as np

from .arrays import Floats


def ratios(log_w: Floats) -> Floats:
    """w itself; may overflow to inf."""
    with np.errstate(over="ignore"):
        return np.exp(log_w)


def clipped(log_w: Floats, boundary: Floats | float) -> Floats:
    """min(w, M). `boundary` is a number or one per target [K]."""
    return np.exp(np.minimum(log_w, np.log(_column(boundary, log_w))))


def standard_error(weights: Floats, y: Floats, size: Floats | None = None) -> Floats:
    """Delta-method standard error of sum w y / sum w size (`size` one unless given): [K] for `weights` [K, n]."""
    size = np.ones_like(y) if size is None else size
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weights @ size
        estimate = (weights @ y) / total
        residual = y - estimate[..., None] * size
        return np.sqrt(((weights * residual) ** 2).sum(-1)) / total


def _column(boundary: Floats | float, log_w: Floats) -> Floats:
    boundary = np.asarray(boundary, dtype=np.float64)
    return boundary[..., None] if boundary.ndim else boundary
