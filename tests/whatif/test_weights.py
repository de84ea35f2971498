"""Weights from log likelihood ratios, and the error of what they estimate."""

from __future__ import annotations

import numpy as np
import pytest

from informed_routing.study.paper.theory.closed_forms import NormalPair
from informed_routing.study.paper.theory.estimators import self_normalised
from informed_routing.whatif.weights import clipped, ratios, standard_error


def test_truncation_by_hand() -> None:
    log_w = np.log([[0.5, 2.0, 8.0], [1.0, 4.0, 0.25]])
    np.testing.assert_allclose(ratios(log_w), [[0.5, 2, 8], [1, 4, 0.25]])
    np.testing.assert_allclose(clipped(log_w, 3.0), [[0.5, 2, 3], [1, 3, 0.25]])
    np.testing.assert_allclose(clipped(log_w, np.array([1.0, 2.0])), [[0.5, 1, 1], [1, 2, 0.25]])
    np.testing.assert_allclose(clipped(log_w, 1e30), ratios(log_w))


def test_impossible_samples_weigh_nothing_and_large_ratios_do_not_overflow() -> None:
    np.testing.assert_allclose(clipped(np.array([-np.inf, 800.0, 801.0]), 10.0), [0, 10, 10])
    assert ratios(np.array([800.0]))[0] == np.inf


def test_the_standard_error_is_the_spread_over_many_samples() -> None:
    x = np.random.default_rng(1).standard_normal((2000, 500))
    log_w = NormalPair(0, 1, 0.7, 1).log_w(x)
    spread = np.std([self_normalised(w, y) for w, y in zip(log_w, x, strict=True)])
    predicted = [standard_error(ratios(w), y) for w, y in zip(log_w, x, strict=True)]
    assert float(np.median(predicted)) == pytest.approx(float(spread), rel=0.1)
