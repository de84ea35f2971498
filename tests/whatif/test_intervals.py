"""Confidence limits: the game against its definition, monotonicity, coverage, and widths."""

from __future__ import annotations

import math

import numpy as np
import pytest

from informed_routing.study.paper.theory.closed_forms import NormalPair, law_of_densities
from informed_routing.whatif import betting, intervals
from informed_routing.whatif.arrays import Floats
from informed_routing.whatif.boundary import b4
from informed_routing.whatif.intervals import Truncation
from informed_routing.whatif.weights import clipped

PAIR = NormalPair(0, 1, 0.8, 1.1)
GRID = np.linspace(-14, 14, 40_001)
LAW = law_of_densities(*PAIR.log_densities(GRID), spacing=float(GRID[1] - GRID[0]))
TARGET = np.exp(PAIR.log_densities(GRID)[0]) * (GRID[1] - GRID[0])
N, REPEATS, DELTA = 1000, 200, 0.05


def outcome(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def truncation(rows: int, n: int = N) -> Truncation:
    boundary = b4(LAW, n, math.log(2 / DELTA))
    facts = (boundary, float(LAW.lost_mass(boundary)), float(LAW.clipped_second_moment(boundary)))
    return Truncation(*(np.full(rows, fact) for fact in facts))


@pytest.fixture(scope="module")
def samples() -> tuple[Floats, Floats]:
    """Inputs and log ratios of many samples of the nominal law: [REPEATS, N] each."""
    x = np.random.default_rng(0).standard_normal((REPEATS, N))
    return x, PAIR.log_w(x)


def test_wealth_is_what_the_game_pays() -> None:
    rng = np.random.default_rng(1)
    n, candidate, level = 83, 0.3, 3.0
    gain, stake = rng.random(n), rng.random(n) * 2
    prior = betting.Prior(np.array([0.2]))
    bets = betting.running_bets(gain[None], stake[None], prior, level)
    game = betting.Game.of_sample(gain[None], stake[None], bets, np.array([2.0]))
    blocks = -(-n // betting.BLOCK)
    wealth, best = 1.0, 1.0
    past: list[tuple[float, float]] = []
    squares = 0.2
    for b in range(blocks):
        own = [i for i in range(b, betting.BLOCK * blocks, blocks) if i < n]
        bet = math.sqrt(2 * level / n * (1 + betting.BLOCK * b) / squares)
        ratio = (0.5 + sum(g for g, _ in past)) / (1 + sum(s for _, s in past))
        for i in own:
            wealth *= 1 + min(bet, 0.75 / (2.0 * candidate)) * (gain[i] - candidate * stake[i])
            squares += (gain[i] - ratio * stake[i]) ** 2
        past += [(gain[i], stake[i]) for i in own]
        best = max(best, wealth)
    assert float(game.log_wealth(np.array([candidate]))[0]) == pytest.approx(math.log(best))


def test_wealth_falls_with_the_candidate_so_that_the_limit_is_where_rejection_ends(
    samples: tuple[Floats, Floats],
) -> None:
    x, log_w = (array[:20] for array in samples)
    at, level = truncation(20), math.log(40)
    weights = clipped(log_w, at.boundary)
    gain, stake = weights * outcome(x), weights + at.lost_mass[:, None]
    top, prior = at.boundary + at.lost_mass, betting.Prior(at.second_moment / 4)
    limits = betting.lower_limits(gain, stake, top, prior, level)
    bets = betting.running_bets(gain, stake, prior, level)
    game = betting.Game.of_sample(gain, stake, bets, top)
    wealth = np.stack([game.log_wealth(np.full(20, r)) for r in np.linspace(0.01, 1, 100)])
    assert (np.diff(wealth, axis=0) <= 1e-9).all()
    assert (game.log_wealth(limits) >= level).all()  # never beyond the true limit
    estimate = gain.sum(1) / stake.sum(1)
    assert (game.log_wealth(limits + 0.006 * (estimate - limits)) < level).all()  # and hardly short of it


def mean_interval(weights: Floats, y: Floats, at: Truncation) -> tuple[Floats, Floats]:
    return intervals.ratio_interval(weights, y, np.ones_like(y), at, DELTA)


def test_mean_intervals_cover(samples: tuple[Floats, Floats]) -> None:
    x, log_w = samples
    truth = float(TARGET @ outcome(GRID))
    at = truncation(REPEATS)
    weights = clipped(log_w, at.boundary)
    inside, widths = [], []
    for row in range(REPEATS):
        low, high = mean_interval(weights[[row]], outcome(x[row]), at.of_rows(slice(0, 1)))
        inside.append(low[0] <= truth <= high[0])
        widths.append(high[0] - low[0])
    assert np.mean(inside) >= 0.95
    assert np.mean(widths) < 0.15


def test_ratio_intervals_cover(samples: tuple[Floats, Floats]) -> None:
    x, log_w = samples
    size = 1 / (1 + np.exp(-GRID / 2))
    truth = float(TARGET @ (size * outcome(GRID)) / (TARGET @ size))
    at = truncation(REPEATS)
    weights = clipped(log_w, at.boundary)
    inside = []
    for row in range(REPEATS):
        own = 1 / (1 + np.exp(-x[row] / 2))
        low, high = intervals.ratio_interval(weights[[row]], own * outcome(x[row]), own, at.of_rows(slice(0, 1)), DELTA)
        inside.append(low[0] <= truth <= high[0])
    assert np.mean(inside) >= 0.95


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_quantile_intervals_cover(samples: tuple[Floats, Floats], level: float) -> None:
    x, log_w = samples
    truth = float(GRID[np.searchsorted(np.cumsum(TARGET), level)])
    at = truncation(REPEATS)
    weights = clipped(log_w, at.boundary)
    low, high = np.transpose(
        [
            np.concatenate(intervals.quantile_interval(weights[[row]], x[row], level, at.of_rows(slice(0, 1)), DELTA))
            for row in range(REPEATS)
        ]
    )
    assert np.mean((low <= truth) & (truth <= high)) >= 0.95
    assert np.isfinite(low).all()
    if level == 0.5:
        assert np.median(high - low) < 0.8


def test_quantiles_that_the_sample_cannot_bound_are_infinite() -> None:
    at = Truncation(np.ones(1), np.zeros(1), np.ones(1))
    low, high = intervals.quantile_interval(np.ones((1, 30)), np.arange(30.0), 0.999, at, DELTA)
    assert low[0] > 0
    assert high[0] == math.inf


def test_a_support_gap_stays_inside_the_interval() -> None:
    """A quarter of the target is out of reach and has outcome 1; what is reached has 0."""
    rng = np.random.default_rng(2)
    log_w = np.full((1, 2000), math.log(0.75))
    at = Truncation(np.ones(1), np.full(1, 0.25), np.full(1, 0.75**2))
    low, high = mean_interval(np.exp(log_w), (rng.random(2000) < 0).astype(float), at)
    assert low[0] == 0
    assert 0.25 <= high[0] < 0.27
