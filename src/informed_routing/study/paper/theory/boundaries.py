"""Truncation boundaries M for min(w, M), with B an outcome bound, L = log(1/delta) per side, v_a = E_Q[w^a].

B0 (Ionides 2008) is known. B1 has the form of Papini et al. 2019 with a constant of ours. B2 and B3 are derived here,
as is B4, which the what-if uses.
"""

from __future__ import annotations

import math
from functools import lru_cache

from scipy.optimize import minimize_scalar


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
