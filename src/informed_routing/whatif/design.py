"""Which nominal workload to measure, so that all targets can be predicted from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from ..errors import InputError
from .arrays import Floats
from .ratio_law import ENUMERABLE
from .workloads import Part, Workload, WorkloadMixture

MOST = 64  # workloads in one design
SMALLEST_SHARE = 1e-4  # parts below are left out


@dataclass(frozen=True)
class Design:
    """A nominal workload and what it makes of each target."""

    nominal: WorkloadMixture
    d2: dict[str, float]  # target -> exact E_Q[w^2]: n prompts are worth n / d2

    @property
    def worst(self) -> float:
        """The largest d2."""
        return max(self.d2.values())


def design_nominal(targets: Sequence[Workload], extra: Sequence[Workload] = (), name: str = "designed") -> Design:
    """The mixture of `targets` and `extra` workloads that minimises the largest d2 over the targets.

    Every d2 is convex in the mixture weights, so the optimum is global. It is at most the number of targets (that is
    what the equal mixture guarantees), and each ratio is at most one over its target's weight. Put the traffic that is
    seen now, or something wide, into `extra` when targets that are not listed may come.

    Raises InputError for no target, more than `MOST` workloads, or a support of more than 2^21 points.
    """
    parts = [*targets, *extra]
    if not targets or len(parts) > MOST:
        raise InputError(f"{len(targets)} targets and {len(extra)} more", f"Give 1 to {MOST}, such as the extreme ones")
    density = _common_grid(parts)
    wanted = density[: len(targets)]

    def second_moments(weights: Floats) -> Floats:
        mixed = weights @ density
        return np.sum(np.divide(wanted**2, mixed, out=np.zeros_like(wanted), where=mixed > 0), axis=1)

    def slack(x: Floats) -> Floats:
        return x[-1] - np.log(second_moments(x[:-1]))

    def slope(x: Floats) -> Floats:
        mixed = x[:-1] @ density
        shares = np.divide(wanted, mixed, out=np.zeros_like(wanted), where=mixed > 0)
        gradient = (shares**2) @ density.T / (shares * wanted).sum(1, keepdims=True)
        return np.hstack([gradient, np.ones((len(wanted), 1))])

    start = np.full(len(parts), 1 / len(parts))
    weights = start if len(parts) == 1 else _minimax(start, second_moments, slack, slope)
    mixture = tuple(Part(weight=float(w), workload=part) for w, part in zip(weights, parts, strict=True) if w > 0)
    d2 = {target.name: float(moment) for target, moment in zip(targets, second_moments(weights), strict=True)}
    return Design(WorkloadMixture(name=name, mixture=mixture), d2)


def _minimax(
    start: Floats,
    second_moments: Callable[[Floats], Floats],
    slack: Callable[[Floats], Floats],
    slope: Callable[[Floats], Floats],
) -> Floats:
    """Weights that sum to one and minimise the largest of `second_moments`: of (weights, z) least z with slack >= 0."""
    parts = len(start)
    level = float(np.log(second_moments(start)).max())
    least = SMALLEST_SHARE / parts
    found = minimize(
        lambda x: x[-1],
        np.append(start, level),
        jac=lambda x: np.append(np.zeros(parts), 1.0),
        bounds=[(least, 1.0)] * parts + [(0.0, level)],
        constraints=[
            {"type": "ineq", "fun": slack, "jac": slope},
            {"type": "eq", "fun": lambda x: x[:-1].sum() - 1, "jac": lambda x: np.append(np.ones(parts), 0.0)},
        ],
        method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-9},
    )
    weights = np.clip(found.x[:-1], 0.0, None)
    weights = np.where(weights > SMALLEST_SHARE, weights, 0.0)
    weights /= weights.sum()
    better = second_moments(weights).max() <= second_moments(start).max()  # the search may fail; the start cannot
    return weights if better else start


def _common_grid(parts: Sequence[Workload]) -> Floats:
    """Probabilities of all points that any part can give: [parts, points]."""
    grids = WorkloadMixture(
        name="all", mixture=tuple(Part(weight=1 / len(parts), workload=part) for part in parts)
    ).support()
    points = sum(len(prompt) * len(output) for prompt, output in grids.values())
    if points * len(parts) > 16 * ENUMERABLE:
        raise InputError(f"{points} different inputs are too many to design for", "Narrow the length distributions")
    return np.stack(
        [
            np.concatenate([np.exp(part.log_grid(domain, *grid)).ravel() for domain, grid in grids.items()])
            for part in parts
        ]
    )
