"""Truncation boundaries M for min(w, M), with B an outcome bound, L = log(1/delta) per side, v_a = E_Q[w^a].

B0 (Ionides 2008) and B5 are known. B1 has the form of Papini et al. 2019 with a constant of ours. B2, B3 and B4 are
derived here.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from .arrays import Floats
from .ratio_law import RatioLaw


def bias_constant(order: float) -> float:
    """C_a = (a - 1)^(a - 1) / a^a: E_Q[(w - M)+] <= C_a v_a M^(1 - a)."""
    return (order - 1) ** (order - 1) / order**order


def b0(n: int) -> float:
    """sqrt(n): consistent, and of no further knowledge."""
    return math.sqrt(n)


@lru_cache(maxsize=64)
def b1_constants(order: float) -> tuple[float, float]:
    """(s_a, f_a): where C_a s^(1-a) + sqrt(2) s^((2-a)/2) + s/3 is least, and its least value."""

    def error(log_s: float) -> float:
        s = math.exp(log_s)
        return bias_constant(order) * s ** (1 - order) + math.sqrt(2) * s ** ((2 - order) / 2) + s / 3

    best = minimize_scalar(error, bounds=(-8.0, 2.0), method="bounded", options={"xatol": 1e-10})
    return math.exp(best.x), float(best.fun)


def b1(n: int, moment: float, log_level: float, order: float = 2.0) -> float:
    """Confidence-tuned, s_a (v_a n / L)^(1/a), for the order a in (1, 2] with v_a = `moment` finite."""
    return b1_constants(order)[0] * (moment * n / log_level) ** (1 / order)


def b1_error(n: int, moment: float, log_level: float, order: float = 2.0, outcome_bound: float = 1.0) -> float:
    """What the error is below at B1 with probability 1 - delta per side: f_a B v_a^(1/a) (L/n)^((a-1)/a)."""
    factor = b1_constants(order)[1] * outcome_bound
    return factor * moment ** (1 / order) * (log_level / n) ** ((order - 1) / order)


@lru_cache(maxsize=64)
def b2_share(order: float = 2.0) -> float:
    """kappa: the share of the error given to bias that makes the exponent of B2 largest (0.1557 at a = 2)."""
    c = bias_constant(order)

    def negative_exponent(kappa: float) -> float:
        # M proportional to kappa^(-1/(a-1)); Bernstein with second moment M^(2-a) v_a = M kappa e / C_a
        return -((1 - kappa) ** 2) * kappa ** (1 / (order - 1)) / (kappa / c + (1 - kappa) / 3)

    return float(minimize_scalar(negative_exponent, bounds=(1e-6, 1 - 1e-6), method="bounded").x)


def b2(error: float, moment: float, order: float = 2.0, outcome_bound: float = 1.0) -> float:
    """Accuracy-tuned and constant in n: (C_a B v_a / (kappa e))^(1/(a-1)), for a purely exponential rate at error e."""
    return (bias_constant(order) * outcome_bound * moment / (b2_share(order) * error)) ** (1 / (order - 1))


def b3(n: int, moment: float, order: float = 2.0) -> float:
    """Moment-adaptive, (v_a sqrt(n))^(1/(a-1)) for a >= 2: bias below B C_a / sqrt(n)."""
    return (moment * math.sqrt(n)) ** (1 / (order - 1))


def b4(law: RatioLaw, n: int, log_level: float) -> float:
    """Input-only optimum over M in [1, n]: argmin of tau_M / 2 + sqrt(2 E_Q[min(w,M)^2] L / n) / 2 + M L / (3 n).

    In units of the outcome's range; uses no outcomes, so it costs no confidence. The default of `predict`.
    """

    def width(log_boundary: Floats) -> Floats:
        boundary = np.exp(log_boundary)
        spread = np.sqrt(2 * law.clipped_second_moment(boundary) * log_level / n)
        return law.lost_mass(boundary) / 2 + spread / 2 + boundary * log_level / (3 * n)

    grid = np.linspace(0.0, math.log(n), 129)
    best = int(np.argmin(width(grid)))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, 128)])
    fine = np.linspace(*around, 65)
    return float(np.exp(fine[np.argmin(width(fine))]))


def b5(log_w: Floats, log_level: float) -> float:
    """Empirical: M with mean(min(w, M)^2) / M^2 = 2 L / (3 n), for ratios whose law is not known.

    Infinite when the share of positive weights is below the right-hand side: the sample is too small.
    """
    wanted = 2 * log_level / (3 * len(log_w))
    finite = log_w[np.isfinite(log_w)]

    def excess(log_boundary: float) -> float:
        return float(np.exp(2 * np.minimum(finite - log_boundary, 0.0)).sum() / len(log_w)) - wanted

    if not len(finite) or excess(float(finite.min())) < 0:
        return math.inf
    high = float(finite.max())
    while excess(high) > 0:
        high += 1.0
    return math.exp(brentq(excess, float(finite.min()), high))
