"""Estimators of the experiments: identities between them, and their expectations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from informed_routing.study.paper.theory import estimators
from informed_routing.study.paper.theory.closed_forms import NormalPair
from informed_routing.whatif.arrays import Floats

RNG = np.random.default_rng(0)
PAIRS = [NormalPair(0, 1, mean, 1) for mean in (0.0, 0.5, 1.0)]
X = RNG.standard_normal(3000)
LOG_W = np.stack([pair.log_w(X) for pair in PAIRS])
Y = np.stack([X, X**2, np.full_like(X, 2.5), (X > 1).astype(float)])


@pytest.mark.parametrize("estimator", [estimators.likelihood_ratio, estimators.self_normalised])
def test_one_target_and_metric_equals_the_vectorised_call(estimator: Callable[..., Floats]) -> None:
    table = estimator(LOG_W, Y)
    assert table.shape == (3, 4)
    assert estimator(LOG_W[0], Y[1]) == pytest.approx(table[0, 1])
    np.testing.assert_allclose(estimator(LOG_W[2], Y), table[-1])
    np.testing.assert_allclose(estimator(LOG_W[0], Y), Y.mean(1))  # equal laws


def test_estimates_by_hand() -> None:
    log_w, y = np.log([0.5, 2.0, 8.0]), np.array([1.0, -1.0, 2.0])
    assert estimators.likelihood_ratio(log_w, y) == pytest.approx((0.5 - 2 + 16) / 3)
    assert estimators.self_normalised(log_w, y) == pytest.approx((0.5 - 2 + 16) / 10.5)
    assert estimators.self_normalised(LOG_W, Y[2]) == pytest.approx(2.5)


def test_impossible_samples_weigh_nothing_and_large_ratios_do_not_overflow() -> None:
    y = np.array([7.0, 1.0, 3.0])
    log_w = np.array([-np.inf, 800.0, 801.0])
    assert estimators.self_normalised(log_w, y) == pytest.approx((1 + 3 * np.e) / (1 + np.e))
    assert np.isnan(estimators.self_normalised(np.full(3, -np.inf), y))


def test_errors_and_bias_over_many_samples() -> None:
    rng = np.random.default_rng(1)
    pair, truth = NormalPair(0, 1, 0.7, 1), 0.7
    x = rng.standard_normal((2000, 500))
    log_w = pair.log_w(x)
    for estimator in (estimators.likelihood_ratio, estimators.self_normalised):
        values = [estimator(w, y) for w, y in zip(log_w, x, strict=True)]
        assert np.mean(values) == pytest.approx(truth, abs=0.02)
        assert np.std(values) < 0.12


def test_post_stratification_by_hand() -> None:
    stratum = np.array([0, 0, 1, 1, 1])
    y = np.array([[1.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    weights = np.array([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(estimators.post_stratified(stratum, y, weights), [[3.5, 0.5], [2.0, 0.0]])
    assert estimators.post_stratified(stratum, y[0], weights[1]) == pytest.approx(2.0)
    missing = np.array([0.5, 0.3, 0.2])
    assert np.isnan(estimators.post_stratified(stratum, y[0], missing))
