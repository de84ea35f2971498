"""Estimators: identities between them, and their expectations."""

from __future__ import annotations

import numpy as np
import pytest

from informed_routing.whatif import estimators
from informed_routing.whatif.closed_forms import NormalPair

RNG = np.random.default_rng(0)
PAIRS = [NormalPair(0, 1, mean, 1) for mean in (0.0, 0.5, 1.0)]
X = RNG.standard_normal(3000)
LOG_W = np.stack([pair.log_w(X) for pair in PAIRS])
Y = np.stack([X, X**2, np.full_like(X, 2.5), (X > 1).astype(float)])


def test_one_target_and_metric_equals_the_vectorised_call() -> None:
    weights = np.array([3.0, 4.0, 5.0])
    calls = {
        "lr": lambda w, y, m: estimators.likelihood_ratio(w, y),
        "clip": estimators.truncated,
        "zero": estimators.truncated_to_zero,
        "sn": lambda w, y, m: estimators.self_normalised(w, y),
        "tsn": estimators.self_normalised,
        "mass": lambda w, y, m: estimators.mass_corrected(w, y, m, m / 100),
        "cv": lambda w, y, m: estimators.control_variate(w, y),
        "psis": lambda w, y, m: estimators.pareto_smoothed(w, y)[0],
    }
    for name, call in calls.items():
        if name == "psis":  # has no tail to smooth at equal weights
            table = call(LOG_W[1:], Y, weights[1:])
        else:
            table = call(LOG_W, Y, weights)
            assert table.shape == (3, 4), name
            assert call(LOG_W[0], Y[1], weights[0]) == pytest.approx(table[0, 1]), name
        np.testing.assert_allclose(call(LOG_W[2], Y, weights[2]), table[-1], err_msg=name)


def test_without_truncation_all_is_the_likelihood_ratio_estimator() -> None:
    classical = estimators.likelihood_ratio(LOG_W, Y)
    np.testing.assert_allclose(classical, np.exp(LOG_W) @ Y.T / 3000)
    for truncate in (estimators.truncated, estimators.truncated_to_zero):
        np.testing.assert_allclose(truncate(LOG_W, Y, 1e30), classical)
    np.testing.assert_allclose(estimators.mass_corrected(LOG_W, Y, 1e30, 0.0), classical)
    np.testing.assert_allclose(
        estimators.self_normalised(LOG_W, Y, 1e30), estimators.self_normalised(LOG_W, Y), rtol=1e-12
    )
    np.testing.assert_allclose(estimators.weighted_mean(estimators.smoothed(LOG_W, 0.0), Y), classical)
    np.testing.assert_allclose(estimators.truncated_product(LOG_W, Y, 1e30), classical)


def test_equal_laws_give_plain_means() -> None:
    for values in (
        estimators.likelihood_ratio(LOG_W[0], Y),
        estimators.control_variate(LOG_W[0], Y),
        estimators.self_normalised(LOG_W[0], Y),
        estimators.weighted_mean(estimators.smoothed(LOG_W[0], 0.3), Y),
    ):
        np.testing.assert_allclose(values, Y.mean(1))


def test_normalised_estimators_are_exact_for_constants() -> None:
    assert estimators.self_normalised(LOG_W, Y[2]) == pytest.approx(2.5)
    assert estimators.self_normalised(LOG_W, Y[2], 1.3) == pytest.approx(2.5)
    assert estimators.control_variate(LOG_W, Y[2]) == pytest.approx(2.5)
    assert estimators.pareto_smoothed(LOG_W[1:], Y[2])[0] == pytest.approx(2.5)


def test_truncation_by_hand() -> None:
    log_w, y = np.log([0.5, 2.0, 8.0]), np.array([1.0, -1.0, 2.0])
    assert estimators.truncated(log_w, y, 3.0) == pytest.approx((0.5 - 2 + 6) / 3)
    assert estimators.truncated_to_zero(log_w, y, 3.0) == pytest.approx((0.5 - 2) / 3)
    assert estimators.truncated_product(log_w, y, 3.0) == pytest.approx((0.5 - 2 + 3) / 3)
    assert estimators.mass_corrected(log_w, y, 3.0, 0.3) == pytest.approx(4.5 / 3 + 0.3 * 4.5 / 5.5)
    assert estimators.smoothed(log_w, 0.25).max() < 4


def test_impossible_samples_weigh_nothing_and_large_ratios_do_not_overflow() -> None:
    log_w = np.array([-np.inf, 800.0, 801.0])
    y = np.array([7.0, 1.0, 3.0])
    assert estimators.self_normalised(log_w, y) == pytest.approx((1 + 3 * np.e) / (1 + np.e))
    assert estimators.truncated(log_w, y, 10.0) == pytest.approx(40 / 3)
    assert np.isnan(estimators.self_normalised(np.full(3, -np.inf), y, 2.0))


def test_errors_and_bias_over_many_samples() -> None:
    rng = np.random.default_rng(1)
    pair, truth = NormalPair(0, 1, 0.7, 1), 0.7
    x = rng.standard_normal((2000, 500))
    log_w = pair.log_w(x)
    by_sample = {
        "lr": [estimators.likelihood_ratio(w, y) for w, y in zip(log_w, x, strict=True)],
        "sn": [estimators.self_normalised(w, y) for w, y in zip(log_w, x, strict=True)],
        "cv": [estimators.control_variate(w, y) for w, y in zip(log_w, x, strict=True)],
    }
    for name, values in by_sample.items():
        spread = np.std(values)
        assert np.mean(values) == pytest.approx(truth, abs=0.02), name
        assert spread < 0.12, name
    predicted = [estimators.standard_error(np.exp(w), y) for w, y in zip(log_w, x, strict=True)]
    assert float(np.median(predicted)) == pytest.approx(float(np.std(by_sample["sn"])), rel=0.1)
    assert np.std(by_sample["cv"]) < np.std(by_sample["lr"])


def test_post_stratification_by_hand() -> None:
    stratum = np.array([0, 0, 1, 1, 1])
    y = np.array([[1.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    weights = np.array([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(estimators.post_stratified(stratum, y, weights), [[3.5, 0.5], [2.0, 0.0]])
    assert estimators.post_stratified(stratum, y[0], weights[1]) == pytest.approx(2.0)
    missing = np.array([0.5, 0.3, 0.2])
    assert np.isnan(estimators.post_stratified(stratum, y[0], missing))


def test_the_sign_that_pareto_smoothing_expects() -> None:
    rng = np.random.default_rng(2)
    w = rng.pareto(2.5, 20_000) + 1  # k = 0.4
    assert estimators.pareto_smoothed(np.log(w), np.ones_like(w))[1] == pytest.approx(0.4, abs=0.15)
    assert estimators.pareto_smoothed(-np.log(w), np.ones_like(w))[1] < 0  # bounded
