"""Truncation boundaries solve what they say, and the bounds hold where the truth can be simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from informed_routing.study.paper.theory import boundaries, bounds
from informed_routing.study.paper.theory.closed_forms import ExponentialPair, NormalPair

PAIR = ExponentialPair(1.0, 0.6)  # tail index 2.5
D2 = PAIR.moment(2.0)
L = math.log(2 / 0.05)


def test_infinite_variance_begins_where_the_target_is_wider_by_root_two() -> None:
    assert math.isfinite(NormalPair(0, 1, 0, 1.41).moment(2.0))
    assert NormalPair(0, 1, 0, 1.42).moment(2.0) == math.inf
    assert NormalPair(0, 1, 0, 1.42).tail_index < 2 < NormalPair(0, 1, 0, 1.41).tail_index


def test_exponential_ratios_are_pareto() -> None:
    pair = ExponentialPair(1.0, 0.6)
    w = np.exp(pair.log_w(np.random.default_rng(0).exponential(size=1_000_000)))
    for t in (1.0, 2.0, 5.0):
        assert float((w > t).mean()) == pytest.approx(float(pair.tail(t)), rel=0.02)
    assert float((w**1.5).mean()) == pytest.approx(pair.moment(1.5), rel=0.01)
    assert 1 - float(np.minimum(w, 3.0).mean()) == pytest.approx(pair.lost_mass(3.0), abs=4e-3)
    assert pair.moment(2.5) == math.inf


@pytest.mark.parametrize(
    ("order", "s", "f"), [(2.0, 0.866, 1.9916), (1.8, 0.619, 1.981), (1.5, 0.291, 1.849), (1.2, 0.0604, 1.501)]
)
def test_constants_of_the_confidence_tuned_boundary(order: float, s: float, f: float) -> None:
    assert boundaries.b1_constants(order) == pytest.approx((s, f), rel=2e-3)


@pytest.mark.parametrize("order", [1.2, 1.5, 2.0])
def test_b1_minimises_its_bound(order: float) -> None:
    moment, n = PAIR.moment(order), 2000

    def bound(m: float) -> float:
        return bounds.t5_deviation(n, m, bounds.t4_bias(m, moment, order), m ** (2 - order) * moment, L)

    best = boundaries.b1(n, moment, L, order)
    least = boundaries.b1_constants(order)[1] * moment ** (1 / order) * (L / n) ** ((order - 1) / order)
    assert bound(best) == pytest.approx(least)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert bound(best * factor) > bound(best)


def test_b2_maximises_the_exponent() -> None:
    n, e = 5000, 0.1

    def tail(share: float) -> float:
        m = D2 / (4 * share * e)
        return bounds.t5_tail(n, e, m, bounds.t4_bias(m, D2), D2)

    best = boundaries.b2_share()
    assert best == pytest.approx(0.1557, abs=2e-4)
    assert boundaries.b2(e, D2) == pytest.approx(D2 / (4 * best * e))
    assert tail(best) == pytest.approx(2 * math.exp(-0.2455 * n * e**2 / D2), rel=5e-3)
    assert tail(best) < min(tail(best * 0.8), tail(best * 1.25))


def test_b0_b3_and_the_bias_they_leave() -> None:
    assert boundaries.b0(400) == 20
    for n in (100, 10_000):
        m = boundaries.b3(n, PAIR.moment(2.4), 2.4)
        assert bounds.t4_bias(m, PAIR.moment(2.4), 2.4) == pytest.approx(boundaries.bias_constant(2.4) / math.sqrt(n))


@pytest.mark.parametrize("order", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("boundary", [1.0, 4.0, 30.0])
def test_t4_bounds_the_exact_lost_mass(order: float, boundary: float) -> None:
    assert PAIR.lost_mass(boundary) <= bounds.t4_bias(boundary, PAIR.moment(order), order)


def test_t1_and_t2_enclose_what_happens() -> None:
    rng = np.random.default_rng(1)
    constant, e = PAIR.scale**PAIR.tail_index, 0.3
    for n in (30, 100, 300):
        repeats = 6_000_000 // n
        means = np.exp(PAIR.log_w(rng.standard_exponential((repeats, n)))).mean(1)
        over = float((means - 1 >= e).mean())
        noise = 4 * math.sqrt(over / repeats)
        assert over - noise <= bounds.t1_upper(n, e, D2 - 1)
        assert over - noise <= bounds.t1_upper(n, e, PAIR.moment(1.8), 1.8)
        assert over + noise >= bounds.best_one_jump(n, e, 1.0, D2, constant, PAIR.tail_index)
        assert over == pytest.approx(bounds.t2_asymptote(n, e, constant, PAIR.tail_index), rel=0.5)


def test_t5_holds_for_truncated_means() -> None:
    rng = np.random.default_rng(2)
    n, m = 200, 6.0
    clipped = np.minimum(np.exp(PAIR.log_w(rng.standard_exponential((20_000, n)))), m)
    second = float((clipped**2).mean())
    errors = np.abs(clipped.mean(1) - 1)
    assert float(np.quantile(errors, 0.95)) <= bounds.t5_deviation(n, m, PAIR.lost_mass(m), second, L)
    for e in (0.2, 0.3, 0.4):
        assert float((errors >= e).mean()) <= bounds.t5_tail(n, e, m, PAIR.lost_mass(m), second)


def test_rates_are_polynomial_without_truncation_and_exponential_with() -> None:
    sizes = np.array([1e3, 1e4, 1e5])
    classical = [bounds.t1_upper(int(n), 0.3, PAIR.moment(1.9), 1.9) for n in sizes]
    slopes = np.diff(np.log(classical)) / np.diff(np.log(sizes))
    np.testing.assert_allclose(slopes, -0.9, atol=1e-6)
    m = boundaries.b2(0.3, D2)
    logs = [math.log(bounds.t5_tail(n, 0.3, m, PAIR.lost_mass(m), D2)) for n in (1000, 2000, 4000)]
    assert (logs[2] - math.log(2)) / (logs[1] - math.log(2)) == pytest.approx(2)
