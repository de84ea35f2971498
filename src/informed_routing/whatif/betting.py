"""Confidence limits by betting (Waudby-Smith & Ramdas 2024), in a form that is monotone in the candidate.

A candidate r is too low unless E[gain] <= r E[stake], where 0 <= gain and 0 <= stake <= stake_max. A bet of l_i, a
function of the past, multiplies the wealth by 1 + l_i (gain_i - r stake_i). If r is not too low, the wealth is a
non-negative super-martingale, so it exceeds 1/delta at any time with probability at most delta (Ville).

The bets do not depend on r, except that they are at most 0.75 / (stake_max r). Each factor then falls as r grows, so
the rejected candidates are exactly an interval [0, limit): its end is found by root-finding, and no grid is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .arrays import Floats

BLOCK = 16  # bets that are placed together; the product of their factors fits a float64
LARGEST_LOSS = 0.75  # of the wealth, in one bet
CELLS = 2**15  # numbers per array that are worked on at a time: they stay in the cache
TINY = 1e-300  # in place of zero in a denominator
PRECISION = 5e-3  # of the distance from estimate to limit; what is left is given to the interval


@dataclass(frozen=True)
class Prior:
    """What the first bets are made of, each worth one observation.

    Any values are valid; good ones narrow the limits.
    """

    variance: Floats  # [rows] of gain - r stake
    stake: float = 1.0
    ratio: float = 0.5

    def of_rows(self, part: slice) -> Prior:
        """The prior of some of the rows."""
        return replace(self, variance=self.variance[part])


@dataclass(frozen=True)
class Game:
    """Rows of a sample in random order, and the bets on them.

    Block b of the game holds the entries [:, :, b]. All bets of a block are the same and rest on the blocks before it,
    and the wealth is looked at after each block: fewer logarithms, and arrays that need no copy.
    """

    gain: Floats  # [rows, BLOCK, blocks]
    stake: Floats  # [rows, BLOCK, blocks]
    bets: Floats  # [rows, blocks]
    stake_max: Floats  # [rows]

    @classmethod
    def of_sample(cls, gain: Floats, stake: Floats, bets: Floats, stake_max: Floats) -> Game:
        """Of gain and stake [rows, n]."""
        return cls(_blocks(gain), _blocks(stake), bets, stake_max)

    def log_wealth(self, candidate: Floats) -> Floats:
        """The largest log wealth over time that betting against `candidate` [rows] reaches: [rows], at least 0."""
        with np.errstate(divide="ignore"):
            largest = LARGEST_LOSS / (self.stake_max * candidate)
        factors = self.stake * -candidate[:, None, None]
        factors += self.gain
        factors *= np.minimum(self.bets, largest[:, None])[:, None]
        factors += 1
        return np.maximum(np.cumsum(np.log(factors.prod(1)), axis=1).max(1), 0.0)

    def guess(self, log_level: float) -> tuple[Floats, Floats]:
        """Where to look first: the estimate, and how far below it the limit would be if gains were normal: [rows]."""
        total = np.maximum(self.stake.sum((1, 2)), TINY)
        estimate = np.clip(self.gain.sum((1, 2)) / total, 0.0, 1.0)
        squares = ((self.gain - estimate[:, None, None] * self.stake) ** 2).sum((1, 2))
        return estimate, np.sqrt(2 * log_level * squares) / total


def running_bets(gain: Floats, stake: Floats, prior: Prior, log_level: float) -> Floats:
    """sqrt(2 L / (n s)) per block, s the running mean square of gain - r stake, r the running ratio: [rows, blocks]."""
    n = gain.shape[1]
    gain, stake = _blocks(gain), _blocks(stake)
    ratio = (prior.ratio * prior.stake + _before(gain)) / (prior.stake + _before(stake))
    squares = prior.variance[:, None] + _before((gain - ratio[:, None] * stake) ** 2)
    return np.sqrt(2 * log_level / n * (1 + BLOCK * np.arange(gain.shape[2])) / np.maximum(squares, TINY))


def pilot_bets(weights: Floats, y: Floats, share: float, second_moment: Floats, log_level: float) -> Floats:
    """Bets on P(Y > t) > `share` that are the same for all t: [rows, blocks].

    They are sized by the second moment of the weights in the first eighth of the sample, and from then on by the
    mean square that this eighth shows at its own quantile.
    """
    n = weights.shape[1]
    weights, y = _blocks(weights), _blocks(y[None])
    pilot = weights.shape[2] // 8
    squares = np.repeat((second_moment * share * (1 - share))[:, None], weights.shape[2], axis=1)
    if pilot:
        early, outcomes = weights[:, :, :pilot].reshape(len(weights), -1), y[0, :, :pilot].ravel()
        order = np.argsort(outcomes)
        mass = np.cumsum(early[:, order], axis=1)
        at = (mass < (1 - share) * mass[:, -1:]).sum(1)
        above = outcomes > outcomes[order[np.minimum(at, len(order) - 1)]][:, None]
        seen = ((early * (above - share)) ** 2).sum(1)
        squares[:, pilot:] = ((squares[:, 0] + seen) / (1 + len(outcomes)))[:, None]
    return np.sqrt(2 * log_level / n / np.maximum(squares, TINY))


def lower_limits(gain: Floats, stake: Floats, stake_max: Floats, prior: Prior, log_level: float) -> Floats:
    """The lower confidence limit in [0, 1] of r = E[gain] / E[stake], with probability 1 - exp(-log_level): [rows].

    `gain`, `stake` are [rows, n] in random order; `stake_max` is [rows].
    """
    rows, n = gain.shape
    step = max(CELLS // n, 1)
    limits = np.zeros(rows)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        bets = running_bets(gain[part], stake[part], prior.of_rows(part), log_level)
        game = Game.of_sample(gain[part], stake[part], bets, stake_max[part])
        limits[part] = _last_rejected(game, log_level)
    return limits


def _last_rejected(game: Game, log_level: float) -> Floats:
    """Per row the largest candidate in [0, 1] seen to be rejected: within `PRECISION` of the limit, and below it.

    Regula falsi (Illinois) on the square root of the wealth's logarithm, which is nearly linear below the estimate.
    """

    def excess(candidate: Floats) -> Floats:
        return np.sqrt(game.log_wealth(candidate)) - math.sqrt(log_level)

    estimate, distance = game.guess(log_level)
    low, high, at_low, at_high = _bracket(excess, estimate, distance)
    none, all_rejected = at_low < 0, at_high >= 0
    last = np.zeros(len(estimate), dtype=int)  # the end that moved last: +1 low, -1 high
    for _ in range(60):
        done = none | all_rejected | (high - low <= PRECISION * np.abs(estimate - low) + 1e-12)
        if done.all():
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            share = at_low / (at_low - at_high)
        share = np.where(np.isfinite(share), np.clip(share, 0.01, 0.99), 0.5)
        middle = low + share * (high - low)
        value = excess(middle)
        up, down = (value >= 0) & ~done, (value < 0) & ~done  # a row that is done stays: no row depends on the others
        at_high = np.where(up & (last > 0), at_high / 2, np.where(down, value, at_high))
        at_low = np.where(down & (last < 0), at_low / 2, np.where(up, value, at_low))
        low, high = np.where(up, middle, low), np.where(down, middle, high)
        last = np.where(up, 1, np.where(down, -1, last))
    return np.where(none, 0.0, np.where(all_rejected, 1.0, low))


def _bracket(
    excess: Callable[[Floats], Floats], estimate: Floats, distance: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """Candidates around the limit and their excess, first looked for where a normal approximation has it."""
    low, high = np.zeros_like(estimate), np.ones_like(estimate)
    at_low, at_high = excess(low), np.full_like(estimate, np.nan)
    for share in (1.2, 2.4, 0.0):
        probe = np.clip(estimate - share * distance, 0.0, 1.0)
        if share == 0.0 and not np.isnan(at_high).any():
            break
        value = excess(probe)
        lower, upper = (value >= 0) & (probe >= low), (value < 0) & (probe <= high)
        low, at_low = np.where(lower, probe, low), np.where(lower, value, at_low)
        high, at_high = np.where(upper, probe, high), np.where(upper, value, at_high)
    unknown = np.isnan(at_high)  # even the estimate is rejected: ratios and sample contradict each other
    if unknown.any():
        at_high = np.where(unknown, excess(high), at_high)
    return low, high, at_low, at_high


def _blocks(rows: Floats) -> Floats:
    """[rows, n] as [rows, BLOCK, blocks], with zeros added, on which no bet wins or loses."""
    short = -rows.shape[1] % BLOCK
    return (np.pad(rows, ((0, 0), (0, short))) if short else rows).reshape(len(rows), BLOCK, -1)


def _before(values: Floats) -> Floats:
    """Sums over all blocks before each block: [rows, blocks]."""
    total = np.cumsum(values.sum(1), axis=1)
    return np.concatenate([np.zeros((len(total), 1)), total[:, :-1]], axis=1)
