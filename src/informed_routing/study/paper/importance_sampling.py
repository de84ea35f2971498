"""Experiments with known truth for likelihood-ratio importance sampling from one nominal distribution.

Each experiment is a function that gives rows: what was estimated, how far off, and the truth beside. Seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import bdtrc, ndtr

from ...errors import InputError
from ...files import atomic as files
from ...progress import NullProgress, Progress
from ...whatif.arrays import Floats
from ...whatif.boundary import b4
from ...whatif.predict import Predictor
from ...whatif.weights import ratios
from . import synthetic_workload as synthetic
from .importance_sampling_rates import Row, Table, infinite_variance, rates
from .theory import estimators
from .theory.boundaries import b0, b1
from .theory.closed_forms import NormalPair, law_of_densities, normal_log_density

LOANS, LOSS_LEVEL = 200, 20  # of the credit portfolio: its size, and the number of defaults to exceed
DEFAULT_THRESHOLD, LOADING = -1.6449, 0.45  # a loan defaults when its part of the factor and noise falls below


def european_call(n: int = 5000, repeats: int = 400, seed: int = 2) -> Table:
    """E1: a call at many volatilities and interest rates from paths of one model; the truth is Black and Scholes'."""
    spot, strike, rate, sigma = 100.0, 100.0, 0.02, 0.20
    rng = np.random.default_rng(seed)
    nominal = (math.log(spot) + rate - sigma**2 / 2, sigma)
    x = rng.normal(*nominal, size=(repeats, n))
    rows = []
    for r, s in [(rate, v) for v in (0.15, 0.25, 0.28, 0.30, 0.35)] + [(v, sigma) for v in (0.05, 0.10)]:
        pair = NormalPair(*nominal, math.log(spot) + r - s**2 / 2, s)
        payoff = math.exp(-r) * np.maximum(np.exp(x) - strike, 0.0)
        settings = {"sigma": s, "rate": r, "d2": pair.moment(2.0), "tail_index": pair.tail_index}
        truth = black_scholes(spot, strike, r, s)
        rows += _compare(pair.log_w(x), payoff, truth, settings, _limits(pair, n))
    return rows


def credit_portfolio(n: int = 5000, repeats: int = 200, seed: int = 3) -> Table:
    """E1b: P(more than 10% of 200 loans default) in a one-factor Gaussian copula, for shifted means of the factor.

    The ratio involves the factor alone. The truth is a quadrature over the factor of binomial tails.
    """
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((repeats, n))
    chance = default_chance(factor)
    hit = (rng.binomial(LOANS, chance) > LOSS_LEVEL).astype(np.float64)
    rows = []
    grid = np.linspace(-12, 12, 20_001)
    tail = bdtrc(LOSS_LEVEL, LOANS, default_chance(grid))
    for shift in (-1.5, -1.0, -0.5, 0.5):
        pair = NormalPair(0.0, 1.0, shift, 1.0)
        truth = float((np.exp(pair.log_densities(grid)[0]) * tail).sum() * (grid[1] - grid[0]))
        settings = {"factor_shift": shift, "d2": pair.moment(2.0)}
        rows += _compare(pair.log_w(factor), hit, truth, settings, _limits(pair, n))
    return rows


def policy_evaluation(n: int = 4000, repeats: int = 100, seed: int = 4) -> Table:
    """E2: cost of linear policies on a linear system from the trajectories of one of them (s' = s + a + 0.1 z)."""
    horizon, nominal_gain, spread, noise = 10, 0.5, 0.3, 0.1
    rng = np.random.default_rng(seed)
    state = np.ones((repeats, n))
    cost = np.zeros_like(state)
    steps = []
    for _ in range(horizon):
        action = -nominal_gain * state + spread * rng.standard_normal(state.shape)
        steps.append((state, action))
        cost += state**2 + 0.1 * action**2
        state = state + action + noise * rng.standard_normal(state.shape)
    rows = []
    for gain in (0.3, 0.4, 0.6, 0.7, 0.9):
        log_w = np.zeros_like(cost)
        for s, a in steps:
            log_w += normal_log_density(a, -gain * s, spread) - normal_log_density(a, -nominal_gain * s, spread)
        rows += _compare(log_w, cost, _policy_cost(gain, horizon, spread, noise), {"gain": gain}, {"B0": b0(n)})
    return rows


def domain_mix(n: int = 2000, repeats: int = 2000, seed: int = 5) -> Table:
    """E3: domain weights (.6, .3, .1) -> (.1, .3, .6), all else equal; beside the spread is its formula."""
    pi, rho = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6])
    means, sd = np.array([0.3, 0.5, 0.9]), 0.05
    rng = np.random.default_rng(seed)
    domain = rng.choice(3, p=pi, size=(repeats, n))
    y = means[domain] + sd * rng.standard_normal(domain.shape)
    log_w = np.log(rho / pi)[domain]
    truth = float(rho @ means)
    d2 = float((rho**2 / pi).sum())
    expected = {
        "LR": math.sqrt((float((rho**2 / pi) @ (means**2 + sd**2)) - truth**2) / n),
        "SN": math.sqrt(float((rho**2 / pi) @ ((means - truth) ** 2 + sd**2)) / n),
        "post-stratified": math.sqrt(d2 * sd**2 / n),
    }
    estimates = {
        "LR": np.array([estimators.likelihood_ratio(w, row) for w, row in zip(log_w, y, strict=True)]),
        "SN": np.array([estimators.self_normalised(w, row) for w, row in zip(log_w, y, strict=True)]),
        "post-stratified": np.array(
            [estimators.post_stratified(g, row, rho) for g, row in zip(domain, y, strict=True)]
        ),
    }
    return [
        {
            "estimator": name,
            "truth": truth,
            "mean": float(values.mean()),
            "sd": float(values.std()),
            "sd_formula": expected[name],
            "d2": d2,
            "repeats": repeats,
        }
        for name, values in estimates.items()
    ]


def support_gap(n: int = 4000, seed: int = 6) -> Table:
    """G: a nominal workload cut at 1024 tokens, a target that goes beyond: ESS and k-hat look well, and all is red."""
    medians = (256.0, 256.0, 256.0)
    nominal = synthetic.workload("cut", medians=medians, longest=1024)
    target = synthetic.workload("whole", medians=medians, shift=0.5, longest=8192)
    table = synthetic.measure(nominal, n, np.random.default_rng(seed))
    found = Predictor(nominal, [target]).predict(table, synthetic.METRICS)
    truth = synthetic.truth(target)
    keys = ("metric", "ess", "khat_weights", "outside", "lost_mass", "mass_z", "lower", "upper", "colour", "reasons")
    return [{key: row[key] for key in keys} | {"truth": truth[row["metric"]]} for row in found.as_dict()["rows"]]


def coverage(n: int = 4000, repeats: int = 200, delta: float = 0.05, seed: int = 7) -> Table:
    """Limits and error bars at 10 targets x 3 metrics in many repeats: how often they hold the exact truth.

    One row per cell, and a last one for all cells together.
    """
    nominal = synthetic.workload("nominal")
    wanted = synthetic.targets()
    predictor = Predictor(nominal, wanted)
    truths = {target.name: synthetic.truth(target) for target in wanted}
    cells: dict[tuple[str, str], list[tuple[bool, bool, str, float]]] = {}
    whole = 0
    for repeat in range(repeats):
        table = synthetic.measure(nominal, n, np.random.default_rng([seed, repeat]))
        found = predictor.predict(table, synthetic.METRICS, delta=delta, seed=repeat)
        inside = []
        for row in found.rows:
            true = truths[row.target][row.metric]
            inside.append(row.lower <= true <= row.upper)
            z = abs(row.truncated_self_normalised - true) / row.standard_error
            normal = z <= 1.959964
            cells.setdefault((row.target, row.metric), []).append(
                (inside[-1], normal, row.colour, row.upper - row.lower)
            )
        whole += all(inside)
    rows: Table = [
        {
            "target": target,
            "metric": metric,
            "truth": truths[target][metric],
            "interval_coverage": float(np.mean([inside for inside, *_ in seen])),
            "normal_coverage": float(np.mean([normal for _, normal, *_ in seen])),
            "width": float(np.mean([width for *_, width in seen])),
            **{
                f"{colour}_share": float(np.mean([c == colour for *_, c, _ in seen]))
                for colour in ("green", "amber", "red")
            },
        }
        for (target, metric), seen in cells.items()
    ]
    green = [normal for seen in cells.values() for _, normal, colour, _ in seen if colour == "green"]
    total = {"target": "all", "metric": "all", "interval_coverage": whole / repeats, "repeats": repeats, "n": n}
    return [*rows, total | {"green_normal_coverage": float(np.mean(green)), "delta": delta}]


EXPERIMENTS: dict[str, Callable[[], Table]] = {
    "rates": rates,
    "infinite-variance": infinite_variance,
    "european-call": european_call,
    "credit-portfolio": credit_portfolio,
    "policy-evaluation": policy_evaluation,
    "domain-mix": domain_mix,
    "support-gap": support_gap,
    "coverage": coverage,
}


def run(out_dir: Path, names: Sequence[str] = (), progress: Progress | None = None) -> dict[str, Table]:
    """Run the named experiments (all of them when none is named) and write JSON, Markdown and SVG into `out_dir`.

    Raises InputError for an unknown name. Files: importance_sampling.json and .md, and one figure per experiment
    that has one. The same seeds give the same files.
    """
    from .importance_sampling_report import figures, markdown

    for name in names:
        if name not in EXPERIMENTS:
            raise InputError(f"unknown experiment {name}", f"Known are {', '.join(EXPERIMENTS)}")
    progress = progress or NullProgress()
    chosen = list(names) or list(EXPERIMENTS)
    results: dict[str, Table] = {}
    progress.stage("experiments", len(chosen))
    for done, name in enumerate(chosen):
        results[name] = EXPERIMENTS[name]()
        progress.advance(done + 1)
    progress.done()
    plain = {
        name: [{key: _plain(value) for key, value in row.items()} for row in rows] for name, rows in results.items()
    }
    drawn = figures(results)
    files.write_json(out_dir / "importance_sampling.json", plain)
    for name, svg in drawn.items():
        files.write_text(out_dir / f"{name}.svg", svg)
    files.write_text(out_dir / "importance_sampling.md", markdown(results, EXPERIMENTS, drawn))
    return results


def black_scholes(spot: float, strike: float, rate: float, sigma: float) -> float:
    """Price of a European call with one year to go."""
    d1 = (math.log(spot / strike) + rate + sigma**2 / 2) / sigma
    return float(spot * ndtr(d1) - strike * math.exp(-rate) * ndtr(d1 - sigma))


def default_chance(factor: Floats) -> Floats:
    """Chance that a loan of the credit portfolio defaults, given the common factor: 5% on average."""
    return np.asarray(ndtr((DEFAULT_THRESHOLD - LOADING * factor) / math.sqrt(1 - LOADING**2)))


def _compare(log_w: Floats, y: Floats, truth: float, settings: Row, limits: dict[str, float]) -> Table:
    """Errors of the estimators over repeats: `log_w` and `y` are [repeats, n]."""
    w = ratios(log_w)
    z = w * y
    centred = w - w.mean(1, keepdims=True)
    slope = (z * centred).mean(1) / (centred**2).mean(1)
    found = {"LR": z.mean(1)}
    found |= {name: (np.minimum(w, limit) * y).mean(1) for name, limit in limits.items()}
    found["SN"] = z.sum(1) / w.sum(1)
    clipped = np.minimum(w, limits["B0"])
    found["TSN at B0"] = (clipped * y).sum(1) / clipped.sum(1)
    found["CV"] = z.mean(1) - slope * (w.mean(1) - 1)
    return [
        settings | {"estimator": name, "boundary": limits.get(name), "truth": truth, **_errors(values, truth)}
        for name, values in found.items()
    ]


def _errors(values: Floats, truth: float) -> Row:
    errors = values - truth
    return {
        "bias": float(errors.mean()),
        "rmse": float(np.sqrt((errors**2).mean())),
        "largest_error": float(np.abs(errors).max()),
        "repeats": len(values),
    }


def _limits(pair: NormalPair, n: int, delta: float = 0.05) -> dict[str, float]:
    """B0, B1 and B4 of two normal laws."""
    order = 2.0 if math.isfinite(pair.moment(2.0)) else (1 + pair.tail_index) / 2
    reach = 12 * max(pair.nominal_sd, pair.target_sd)
    grid = np.linspace(pair.nominal_mean - reach, pair.nominal_mean + reach, 40_001)
    law = law_of_densities(*pair.log_densities(grid), spacing=float(grid[1] - grid[0]))
    level = math.log(2 / delta)
    return {"B0": b0(n), "B1": b1(n, pair.moment(order), level, order), "B4": b4(law, n, level)}


def _policy_cost(gain: float, horizon: int, spread: float, noise: float) -> float:
    second, total = 1.0, 0.0
    for _ in range(horizon):
        total += second + 0.1 * (gain**2 * second + spread**2)
        second = (1 - gain) ** 2 * second + spread**2 + noise**2
    return total


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
