"""Targets that differ from the nominal workload in domain weights alone, for which post-stratification is sharper."""

from __future__ import annotations

import numpy as np

from .arrays import Floats
from .workloads import AnyWorkload, Inputs, Workload


def domain_shares(nominal: AnyWorkload, target: AnyWorkload, inputs: Inputs) -> dict[str, float] | None:
    """The target's domain weights, where nothing else differs and the sample holds each of its domains; else None.

    Also None for equal workloads, which need no weights.
    """
    if not isinstance(nominal, Workload) or not isinstance(target, Workload):
        return None
    shares = {name: domain.weight for name, domain in target.domains.items() if domain.weight > 0}
    for name in shares:
        known = nominal.domains.get(name)
        if known is None or name not in inputs.rows:
            return None
        wanted = target.domains[name]
        if (known.prompt_tokens, known.output_tokens) != (wanted.prompt_tokens, wanted.output_tokens):
            return None
    same = all(nominal.domains[name].weight == share for name, share in shares.items())
    return None if same else shares


def stratified_weights(shares: dict[str, float], inputs: Inputs) -> Floats:
    """Weights with which each domain counts as much as its share: [n], of mean 1."""
    weights = np.zeros(len(inputs))
    for name, share in shares.items():
        weights[inputs.rows[name]] = share * len(inputs) / len(inputs.rows[name])
    return weights


def stratified_error(shares: dict[str, float], inputs: Inputs, part: Floats, size: Floats, ratio: float) -> float:
    """Standard error of the post-stratified sum of `part` over that of `size`; NaN with one prompt in a domain."""
    variance, total = 0.0, 0.0
    for name, share in shares.items():
        rows = inputs.rows[name]
        residual = part[rows] - ratio * size[rows]
        variance += share**2 * (float(residual.var(ddof=1)) if len(rows) > 1 else np.nan) / len(rows)
        total += share * float(size[rows].mean())
    return float(np.sqrt(variance)) / total
