"""Confidence intervals of E_P[A] / E_P[T] from a sample of Q, with the exact lost mass tau.

Let W = min(w, M) and 0 <= A <= T <= 1. The part of E_P[A - r T] that truncation and q = 0 hide is at least -tau r, so
E_Q[W A] <= r E_Q[W T + tau] holds for every r that is not too low. That is tested by `betting` (or by the empirical
Bernstein inequality); the upper limit comes from T - A. A mean has T = 1. The prompts must be independent and in
random order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .arrays import Bools, Floats
from .betting import Game, Prior, lower_limits, pilot_bets
from .estimators import clipped

Method = Literal["betting", "bernstein"]
FALLBACK_BOUNDARIES = (2.0, 8.0, 32.0)


@dataclass(frozen=True)
class Truncation:
    """Per target: boundary M, lost mass tau_M, and E_Q[min(w, M)^2], which may be a guess (it sizes the bets only)."""

    boundary: Floats  # [K]
    lost_mass: Floats  # [K]
    second_moment: Floats  # [K]

    def of_rows(self, part: slice) -> Truncation:
        """That of some of the targets."""
        return Truncation(self.boundary[part], self.lost_mass[part], self.second_moment[part])


def mean_interval(
    weights: Floats, y: Floats, truncation: Truncation, delta: float, method: Method = "betting"
) -> tuple[Floats, Floats]:
    """Limits of E_P[Y], Y in [0, 1], that hold together with probability 1 - delta for each target: two arrays [K].

    `weights` [K, n] are min(w, M), `y` is [n].
    """
    return ratio_interval(weights, y, np.ones_like(y), truncation, delta, method)


def ratio_interval(
    weights: Floats,
    part: Floats,
    size: Floats,
    truncation: Truncation,
    delta: float,
    method: Method = "betting",
) -> tuple[Floats, Floats]:
    """Limits of E_P[A] / E_P[T] for 0 <= A <= T <= 1: two arrays [K]; see `mean_interval`.

    `part` = A and `size` = T are [n]. Where the two limits cross, ratios and sample contradict each other.
    """
    log_level = math.log(2 / delta)
    stake = weights * size + truncation.lost_mass[:, None]
    stake_max = truncation.boundary + truncation.lost_mass
    prior = Prior(truncation.second_moment / 4)

    def lower(gain: Floats) -> Floats:
        if method == "bernstein":
            return _bernstein_limits(gain, stake, truncation.boundary, log_level)
        return lower_limits(gain, stake, stake_max, prior, log_level)

    return lower(weights * part), 1 - lower(weights * (size - part))


def quantile_interval(
    weights: Floats, y: Floats, level: float, truncation: Truncation, delta: float
) -> tuple[Floats, Floats]:
    """Limits of the `level`-quantile of Y under P: two arrays [K], -inf or inf where the sample cannot tell.

    t is too low if P(Y > t) > 1 - level is proved, too high if P(Y < t) > level is. Bets use `level`, not t, so
    both proofs are monotone in t and no union over t is paid.
    """
    order = np.sort(np.unique(y))
    log_level = math.log(2 / delta)
    low = _first_kept(weights, y, order, 1 - level, truncation, log_level)
    high = -_first_kept(weights, -y, -order[::-1], level, truncation, log_level)
    return low, high


def interval_without_law(log_w: Floats, y: Floats, delta: float) -> tuple[Floats, Floats]:
    """Limits of E_P[Y], Y in [0, 1], where only w is known at the sample, not its law: two arrays [K].

    [LCB(min(w,M) Y), 1 - LCB(min(w,M) (1 - Y))] holds for each M and under a support gap; the best of M = 2, 8, 32 is
    taken at the price of a union. Two to eight times wider than `mean_interval`.
    """
    log_level = math.log(2 * len(FALLBACK_BOUNDARIES) / delta)
    lows, highs = [], []
    for boundary in FALLBACK_BOUNDARIES:
        weights = clipped(log_w, boundary)
        stake, top = np.ones_like(weights), np.ones(len(weights))
        prior = Prior(np.full(len(weights), 0.25))
        lows.append(lower_limits(weights * y, stake, top, prior, log_level))
        highs.append(1 - lower_limits(weights * (1 - y), stake, top, prior, log_level))
    return np.max(lows, axis=0), np.min(highs, axis=0)


def _bernstein_limits(gain: Floats, stake: Floats, span: Floats, log_level: float) -> Floats:
    """Lower limits by the empirical Bernstein inequality of Maurer and Pontil (2009): [rows].

    Rejected are the r with f(r) = mean(gain - r stake) - sqrt(2 S^2 l / n) - 7 span l / (3 (n - 1)) > 0, where
    l = log(2/delta) and S is the standard deviation.
    f is concave, so they are an interval; it counts only if it begins at 0, otherwise the limit is 0.
    """
    n = gain.shape[1]
    level = log_level + math.log(2)
    slack = 7 * span * level / (3 * (n - 1))
    factor = 2 * level / n
    mean_gain, mean_stake = gain.mean(1) - slack, stake.mean(1)
    centred_gain = gain - gain.mean(1, keepdims=True)
    centred_stake = stake - mean_stake[:, None]
    var_gain, var_stake = (centred_gain**2).sum(1) / (n - 1), (centred_stake**2).sum(1) / (n - 1)
    covariance = (centred_gain * centred_stake).sum(1) / (n - 1)
    # (mean_gain - r mean_stake)^2 = factor (var_gain - 2 r covariance + r^2 var_stake), its smaller root
    a = mean_stake**2 - factor * var_stake
    half_b = factor * covariance - mean_gain * mean_stake
    c = mean_gain**2 - factor * var_gain
    begins = (mean_gain > 0) & (c > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = c / (-half_b + np.sqrt(np.maximum(half_b**2 - a * c, 0.0)))
    return np.where(begins, np.clip(np.nan_to_num(root, nan=0.0, posinf=1.0), 0.0, 1.0), 0.0)


def _first_kept(
    weights: Floats, y: Floats, order: Floats, share: float, truncation: Truncation, log_level: float
) -> Floats:
    """Per row the smallest t of `order` for which P(Y > t) > `share` is not proved; -inf if that holds for any t."""
    rows = len(weights)
    stake = weights + truncation.lost_mass[:, None]
    stake_max = truncation.boundary + truncation.lost_mass
    bets = pilot_bets(weights, y, share, truncation.second_moment, log_level)

    def proved(above: Bools) -> Bools:
        game = Game.of_sample(weights * above, stake, bets, stake_max)
        return game.log_wealth(np.full(rows, share)) >= log_level

    below_all = ~proved(np.ones_like(weights, dtype=bool))
    first, last = np.zeros(rows, dtype=np.int64), np.full(rows, len(order) - 1, dtype=np.int64)
    while (first < last).any():  # at the last one nothing is above, so nothing can be proved there
        middle = (first + last) // 2
        too_low = proved(y > order[middle][:, None])
        first, last = np.where(too_low & (first < last), middle + 1, first), np.where(too_low, last, middle)
    return np.where(below_all, -np.inf, order[first])
