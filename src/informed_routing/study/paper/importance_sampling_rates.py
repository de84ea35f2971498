"""How fast likelihood-ratio estimators concentrate, with and without truncation, on a Pareto-tailed ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ...whatif.arrays import Floats
from .theory import bounds
from .theory.boundaries import b0, b1, b2, b3
from .theory.closed_forms import ExponentialPair

Row = dict[str, Any]
Table = list[Row]

ERROR = 0.3  # of the rate experiment
SIZES = (30, 100, 300, 1000)
CELLS = 2**22  # random numbers that are held at a time


def rates(repeats: int = 60_000, seed: int = 0) -> Table:
    """E0: P(|error| >= 0.3) against n for Exp(1) -> Exp(p), Y = 1, classical and truncated, beside T1, T2 and T5."""
    rows = []
    for target_rate, order in ((0.6, 2.4), (0.4, 1.6)):
        pair = ExponentialPair(1.0, target_rate)
        finite = math.isfinite(pair.moment(2.0))
        low_order = 2.0 if finite else (1 + pair.tail_index) / 2
        for n in SIZES:
            limits = {"B0": b0(n), "B2": b2(ERROR, pair.moment(low_order), low_order)}
            if finite:
                limits["B3"] = b3(n, pair.moment(order), order)
            means = _exponential_means(pair, n, repeats, np.random.default_rng([seed, n]), list(limits.values()))
            for name, values in zip(["LR", *limits], means, strict=True):
                over, under = int((values - 1 >= ERROR).sum()), int((values - 1 <= -ERROR).sum())
                row = {"target_rate": target_rate, "tail_index": pair.tail_index, "n": n, "estimator": name}
                row |= {"over": over / repeats, "under": under / repeats, "truth": 1.0, "repeats": repeats}
                rows.append(row | _rate_bounds(pair, n, limits.get(name), low_order))
    return rows


def infinite_variance(scale: float = 1.0, seed: int = 1) -> Table:
    """Exp(1) -> Exp(0.4), whose ratio has no variance: root mean square and 99.9% error of LR, B0 and B1."""
    pair = ExponentialPair(1.0, 0.4)
    order = 1.5
    rows = []
    for n, full in ((1000, 20_000), (10_000, 3_000)):
        repeats = int(scale * full)
        limits = {"B0": b0(n), "B1": b1(n, pair.moment(order), math.log(1 / 0.001), order)}
        means = _exponential_means(pair, n, repeats, np.random.default_rng([seed, n]), list(limits.values()))
        for name, values in zip(["LR", *limits], means, strict=True):
            errors = np.abs(values - 1)
            rms = float(np.sqrt((errors**2).mean()))
            row = {"n": n, "estimator": name, "boundary": limits.get(name), "truth": 1.0, "rmse": rms}
            rows.append(row | {"error_99.9%": float(np.quantile(errors, 0.999)), "repeats": repeats})
    return rows


def _exponential_means(
    pair: ExponentialPair, n: int, repeats: int, rng: np.random.Generator, limits: Iterable[float]
) -> list[Floats]:
    """Means of w, and of min(w, M) for each limit, over `repeats` samples."""
    limits = list(limits)
    found: list[list[Floats]] = [[] for _ in range(1 + len(limits))]
    step = max(CELLS // n, 1)
    for first in range(0, repeats, step):
        w = np.exp(pair.log_w(rng.standard_exponential((min(step, repeats - first), n))))
        found[0].append(w.mean(1))
        for values, limit in zip(found[1:], limits, strict=True):
            values.append(np.minimum(w, limit).mean(1))
    return [np.concatenate(values) for values in found]


def _rate_bounds(pair: ExponentialPair, n: int, boundary: float | None, order: float) -> Row:
    """The bounds of one row of `rates`."""
    if boundary is not None:
        tau = pair.lost_mass(boundary)
        second = _clipped_second_moment(pair, boundary)
        return {"boundary": boundary, "T5_upper": bounds.t5_tail(n, ERROR, boundary, tau, second)}
    constant, second = pair.scale**pair.tail_index, pair.moment(2.0)
    moment = second - 1 if order == 2.0 else pair.moment(order)
    row: Row = {"T1_upper": bounds.t1_upper(n, ERROR, moment, order)}
    row["T2_lower"] = bounds.best_one_jump(n, ERROR, 1.0, second, constant, pair.tail_index)
    row["one_jump"] = bounds.t2_asymptote(n, ERROR, constant, pair.tail_index)
    return row


def _clipped_second_moment(pair: ExponentialPair, boundary: float) -> float:
    """E_Q[min(w, M)^2] = s^2 + integral of 2 t Q(w > t) over s < t < M, for a Pareto law."""
    s, a = pair.scale, pair.tail_index
    return s**2 + 2 * s**a * (s ** (2 - a) - boundary ** (2 - a)) / (a - 2)
