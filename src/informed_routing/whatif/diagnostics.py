"""How far a prediction can be trusted: effective sample sizes, tail shapes, the mass check, and a traffic light."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .arrays import Floats

Colour = Literal["green", "amber", "red"]

FEWEST = 30  # prompts below which nothing is predicted
ROUNDING = 1e-9  # by which logarithms of equal ratios may differ
TINY = -700.0  # stands for the logarithm of zero


def effective_sample_size(log_w: Floats) -> Floats:
    """(sum w)^2 / sum w^2 of `log_w` [K, n], an estimate of n / d_2: [K]; 0 when all weights are zero."""
    top = log_w.max(-1, keepdims=True)
    w = np.exp(log_w - np.where(np.isfinite(top), top, 0.0))
    squares = (w**2).sum(-1)
    return np.where(squares > 0, w.sum(-1) ** 2 / np.maximum(squares, 1e-300), 0.0)


def top_share(log_w: Floats, share: float = 0.01) -> Floats:
    """The part of the total weight that the largest `share` of the sample carries: [K]."""
    top = log_w.max(-1, keepdims=True)
    w = np.exp(log_w - np.where(np.isfinite(top), top, 0.0))
    count = max(round(share * w.shape[-1]), 1)
    largest = np.partition(w, -count, axis=-1)[..., -count:]
    return largest.sum(-1) / np.maximum(w.sum(-1), 1e-300)


def mass_check(weights: Floats, truncated_mass: Floats) -> Floats:
    """z = (mean(W) - (1 - t)) / (sd(W) / sqrt(n)) for W = min(w, M) [K, n]: [K].

    `truncated_mass` = t [K] is what truncation alone takes of the target, so that a gap in the nominal support shows,
    too. Far from zero when densities, sampling or support are wrong. Weights without spread give 0 or +-inf.
    """
    surplus = weights.mean(-1) - (1 - truncated_mass)
    scale = weights.std(-1) / math.sqrt(weights.shape[-1])
    level = np.abs(surplus) <= 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(level, 0.0, surplus / scale)


def pareto_shape(log_values: Floats) -> Floats:
    """k-hat of the upper tail of exp(`log_values`) [K, n]: [K].

    -inf for a tail that is level, or whose lower quarter does not rise above its start: equal weights, or a handful of
    different ones, which are bounded. NaN below 25 values, where there is no tail to fit.
    """
    from arviz_stats.base import array_stats

    log_values = np.maximum(np.nan_to_num(log_values, neginf=TINY), TINY)
    n = log_values.shape[-1]
    if n < 25:
        return np.full(log_values.shape[:-1], np.nan)
    tail = math.floor(3 * math.sqrt(n)) if n > 225 else n // 5
    kept, relative = n, 1.0
    if n > 6 * tail > 225:  # the fit looks only at the tail: leave the rest out, and ask for a tail of the same size
        kept, relative = 6 * tail, 9 * 6 * tail / (tail + 0.5) ** 2
        log_values = np.partition(log_values, n - kept, axis=-1)[..., n - kept :]
    shapes = np.full(log_values.shape[:-1], -np.inf)
    start, quarter = kept - tail - 1, kept - tail - 1 + max(int(tail / 4 + 0.5), 1)
    around = np.partition(log_values, [start, start + 1, quarter], axis=-1)
    spread = around[..., quarter] > around[..., start] + ROUNDING
    spread &= log_values.max(-1) > around[..., start + 1] + ROUNDING
    for row in zip(*np.nonzero(spread), strict=True):
        # arviz-stats expects log likelihoods and negates them inside: give it -log w
        shapes[row] = array_stats.psislw(-log_values[row], r_eff=relative)[1]
    return shapes


def reliable_shape(n: int) -> float:
    """min(1 - 1/log10(n), 0.7), the k-hat above which smoothed sums are not reliable (Vehtari et al. 2024)."""
    return min(1 - 1 / math.log10(n), 0.7)


@dataclass(frozen=True)
class Evidence:
    """What the traffic light looks at for one target and metric."""

    prompts: int
    lost_mass: float
    outside: float
    exact_ess: float  # n / d_2, over what the nominal workload reaches
    ess: float
    kl: float
    khat_weights: float
    khat_metric: float
    mass_z: float
    clipped: float  # share of values cut to the metric's bounds
    half_width: float  # of the interval; negative when its limits contradict each other
    tolerance: float = math.inf  # for the half-width
    point: float = 0.0  # the estimate; NaN when there is none


def traffic_light(evidence: Evidence) -> tuple[Colour, list[str]]:
    """The colour and its reasons: red says do not use a point value; amber, use the interval and no error bar."""
    red = [reason for holds, reason in _red(evidence) if holds]
    if red:
        return "red", red
    amber = [reason for holds, reason in _amber(evidence) if holds]
    return ("amber", amber) if amber else ("green", [])


def _red(e: Evidence) -> list[tuple[bool, str]]:
    limit = reliable_shape(e.prompts) if e.prompts > 1 else 0.0
    return [
        (e.prompts < FEWEST, f"{e.prompts} prompts, fewer than {FEWEST}"),
        (e.outside > 1e-3, f"{e.outside:.1%} of the target lies outside the nominal workload"),
        (e.lost_mass > 0.10, f"truncation and gaps lose {e.lost_mass:.1%} of the target, more than 10%"),
        (
            e.exact_ess < 30 and e.ess < 100,
            f"the sample is worth {e.exact_ess:.3g} prompts of the target (measured: {e.ess:.3g})",
        ),
        (
            e.kl > math.log(max(e.prompts, 1) / 10),
            f"divergence: exp(KL) = {_exp(e.kl):.3g} exceeds a tenth of the prompts",
        ),
        (not e.khat_weights <= limit, f"k-hat of the weights {e.khat_weights:.2f} exceeds {limit:.2f}"),
        (not abs(e.mass_z) <= 4, f"mass check: the mean weight is {e.mass_z:+.1f} standard errors off"),
        (e.half_width < 0, "the confidence limits contradict each other: the densities or the sample are wrong"),
        (math.isnan(e.point), "no prompt of the sample could come from this target"),
    ]


def _amber(e: Evidence) -> list[tuple[bool, str]]:
    wide = not e.half_width <= e.tolerance
    return [
        (e.khat_weights >= 0.5, f"k-hat of the weights {e.khat_weights:.2f}: their variance may be infinite"),
        (not e.khat_metric < 0.5, f"k-hat of the metric {e.khat_metric:.2f}: rare prompts decide its error"),
        (e.ess < 400, f"effective sample size {e.ess:.0f}, below 400"),
        (e.lost_mass > 0.02, f"truncation loses {e.lost_mass:.1%} of the target, more than 2%"),
        (e.clipped > 0.01, f"{e.clipped:.1%} of the values were cut to the metric's bounds"),
        (wide, f"interval of +-{e.half_width:.3g}, wider than the tolerance {e.tolerance:.3g}"),
    ]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
