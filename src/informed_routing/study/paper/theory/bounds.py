"""Concentration bounds T1, T2, T4 and T5 of the classical (LR) and the truncated (TLR, min(w, M)) estimator.

Notation: Z = w Y, u_a = E_Q |Z|^a <= B^a v_a, mu = E_P[Y], e the error, L = log(1/delta) per side. T1 and T2 show
that LR with heavy-tailed ratios concentrates no faster than polynomially; T5 that TLR does exponentially.
"""

from __future__ import annotations

import math

import numpy as np

from .boundaries import bias_constant


def t1_upper(n: int, error: float, moment: float, order: float = 2.0) -> float:
    """P(|LR - mu| >= e) <= 2^(3-a) u_a / (n^(a-1) e^a), a in (1, 2], with `moment` = u_a.

    Markov's inequality of order a with von Bahr and Esseen (1965). At a = 2 it is Chebyshev's, with `moment` = Var(Z).
    """
    if order == 2.0:
        return min(moment / (n * error**2), 1.0)
    return min(2 ** (3 - order) * moment / (n ** (order - 1) * error**order), 1.0)


def t2_one_jump(n: int, tail: float) -> float:
    """(i) P(LR - mu >= e) >= 1 - (1 - tail)^n for Z >= 0, where `tail` = Q(Z > n (mu + e))."""
    return -math.expm1(n * math.log1p(-tail))


def t2_one_jump_sharp(n: int, tail: float, slack: float, mean: float, moment: float) -> float:
    """(ii) n q (1 - exp(-(n-1) (eta - mu/n)+^2 / (2 u_2))) - (n q)^2 / 2, where `tail` = q = Q(Z > n (e + eta)).

    A lower bound of P(LR - mu >= e) for Z >= 0, finite `moment` = u_2 and any `slack` = eta > 0: the best counts.
    """
    room = max(slack - mean / n, 0.0)
    return n * tail * -math.expm1(-(n - 1) * room**2 / (2 * moment)) - (n * tail) ** 2 / 2


def t2_asymptote(n: int, error: float, tail_constant: float, tail_index: float) -> float:
    """(iii) P(LR - mu >= e) ~ n^(1-alpha) c e^-alpha when Q(Z > t) ~ c t^-alpha, alpha > 1."""
    return n ** (1 - tail_index) * tail_constant * error**-tail_index


def t4_bias(boundary: float, moment: float, order: float = 2.0, outcome_bound: float = 1.0) -> float:
    """|E TLR - mu| <= B tau_M <= B C_a v_a M^(1-a)."""
    return outcome_bound * bias_constant(order) * moment * boundary ** (1 - order)


def t5_deviation(
    n: int, boundary: float, lost_mass: float, second_moment: float, log_level: float, outcome_bound: float = 1.0
) -> float:
    """|TLR - mu| stays below this with probability 1 - delta per side (Bernstein).

    B (tau_M + sqrt(2 E_Q[min(w,M)^2] L / n) + M L / (3 n)); without the law of w, give the bounds of `t4_bias` and
    M^(2-a) v_a as `lost_mass` and `second_moment`.
    """
    spread = math.sqrt(2 * second_moment * log_level / n)
    return outcome_bound * (lost_mass + spread + boundary * log_level / (3 * n))


def t5_tail(
    n: int, error: float, boundary: float, lost_mass: float, second_moment: float, outcome_bound: float = 1.0
) -> float:
    """P(|TLR - mu| >= e) <= 2 exp(-n x^2 / (2 (s + M x / 3))), x = e/B - tau_M, s = E_Q[min(w,M)^2]; 1 when x <= 0."""
    room = error / outcome_bound - lost_mass
    if room <= 0:
        return 1.0
    return min(2 * math.exp(-n * room**2 / (2 * (second_moment + boundary * room / 3))), 1.0)


def best_one_jump(n: int, error: float, mean: float, moment: float, tail_constant: float, tail_index: float) -> float:
    """The largest of T2 (i) and (ii) over eta for a Pareto tail Q(Z > t) = c t^-alpha."""

    def tail(t: float) -> float:
        return min(tail_constant * t**-tail_index, 1.0)

    slacks = np.geomspace(1e-3, 10.0, 200)
    sharp = max(t2_one_jump_sharp(n, tail(n * (error + eta)), eta, mean, moment) for eta in slacks)
    return max(t2_one_jump(n, tail(n * (mean + error))), sharp)
