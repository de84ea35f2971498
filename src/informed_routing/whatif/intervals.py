"""Confidence intervals of E_P[A] / E_P[T] from a sample of Q, with the exact lost mass tau.

Let W = min(w, M) and 0 <= A <= T <= 1. The part of E_P[A - r T] that truncation and q = 0 hide is at least -tau r, so
E_Q[W A] <= r E_Q[W T + tau] holds for every r that is not too low. That is tested by `betting`; the upper limit comes
from T - A. A mean has T = 1. The prompts must be independent and in random order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .arrays import Bools, Floats
from .betting import Game, Prior, lower_limits, pilot_bets


@dataclass(frozen=True)
class Truncation:
    """Per target: boundary M, lost mass tau_M, and E_Q[min(w, M)^2], which may be a guess (it sizes the bets only)."""

    boundary: Floats  # [K]
    lost_mass: Floats  # [K]
    second_moment: Floats  # [K]

    def of_rows(self, part: slice) -> Truncation:
        """That of some of the targets."""
        return Truncation(self.boundary[part], self.lost_mass[part], self.second_moment[part])


def ratio_interval(
    weights: Floats,
    part: Floats,
    size: Floats,
    truncation: Truncation,
    delta: float,
) -> tuple[Floats, Floats]:
    """Limits of E_P[A] / E_P[T], 0 <= A <= T <= 1, that hold together with probability 1 - delta for each target.

    `weights` [K, n] are min(w, M); `part` = A and `size` = T are [n]. Gives two arrays [K]; where they cross, ratios
    and sample contradict each other.
    """
    log_level = math.log(2 / delta)
    stake = weights * size + truncation.lost_mass[:, None]
    stake_max = truncation.boundary + truncation.lost_mass
    prior = Prior(truncation.second_moment / 4)

    def lower(gain: Floats) -> Floats:
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
