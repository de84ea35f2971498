"""A cost model of a routed language model with a known truth at every workload."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...whatif.arrays import Floats, Ints
from ...whatif.metrics import MeanMetric, Metric, RatioMetric
from ...whatif.workloads import AnyWorkload, Workload, workload_from_mapping

DOMAINS = ("chat", "prose", "code")
UNITS = 60  # per token
NOISE = 0.15  # half-width of the uniform noise of the executed fraction
METRICS: tuple[Metric, ...] = (
    RatioMetric(name="executed_fraction", column="executed", per="possible", upper=1.0, per_token=UNITS),
    MeanMetric(name="seconds", column="seconds", upper=40.0),
    RatioMetric(name="loss_per_token", column="loss_sum", per="loss_tokens", upper=8.0, per_token=1.0),
)


def workload(
    name: str,
    weights: tuple[float, float, float] = (0.5, 0.3, 0.2),
    shift: float = 0.0,
    sigma: float = 0.8,
    longest: int = 2048,
    medians: tuple[float, float, float] = (96.0, 128.0, 192.0),
) -> Workload:
    """Domain weights, and prompts of log length N(log median + shift, sigma^2), from 8 to `longest` tokens."""
    domains = {
        domain: {
            "weight": weight,
            "prompt_tokens": {
                "median": median * float(np.exp(shift)),
                "sigma": sigma,
                "minimum": 8,
                "maximum": longest,
            },
            "output_tokens": {"probabilities": {1: 0.25, 4: 0.25, 16: 0.5}},
        }
        for domain, weight, median in zip(DOMAINS, weights, medians, strict=True)
    }
    made = workload_from_mapping({"name": name, "domains": domains})
    assert isinstance(made, Workload)
    return made


def targets() -> list[Workload]:
    """Ten, from the nominal workload itself to one that cannot be predicted from it."""
    return [
        workload("same"),
        workload("slightly longer", shift=0.3),
        workload("shorter", shift=-0.5),
        workload("longer", shift=0.8),
        workload("much longer", shift=1.6),
        workload("far longer", shift=2.4),
        workload("narrower", shift=0.3, sigma=0.6),
        workload("wider", sigma=1.0),
        workload("wider and longer", shift=0.5, sigma=1.1),
        workload("mostly code", weights=(0.1, 0.2, 0.7)),
    ]


def measure(law: AnyWorkload, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """The measurement table of n prompts."""
    inputs = law.sample(n, rng)
    domain = np.searchsorted(np.sort(DOMAINS), inputs.domain)
    prompt, output = inputs.prompt_tokens, inputs.output_tokens
    fraction, seconds, loss = _means(domain, prompt, output)
    possible = UNITS * (prompt + output)
    return {
        "domain": inputs.domain,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "executed": possible * (fraction + rng.uniform(-NOISE, NOISE, n)),
        "possible": possible,
        "seconds": seconds * rng.uniform(0.6, 1.4, n),
        "loss_sum": prompt * (loss + rng.uniform(-1.0, 1.0, n)),
        "loss_tokens": prompt,
    }


def truth(law: AnyWorkload) -> dict[str, float]:
    """The exact value of each metric, by enumeration of all inputs."""
    sums = np.zeros(5)
    for name, (prompt, output) in law.support().items():
        mass = np.exp(law.log_grid(name, prompt, output))
        domain = np.full(1, np.searchsorted(np.sort(DOMAINS), name))
        grid_prompt, grid_output = prompt[:, None], output[None, :]
        fraction, seconds, loss = _means(domain, grid_prompt, grid_output)
        possible = UNITS * (grid_prompt + grid_output)
        for index, values in enumerate((possible * fraction, possible, seconds, grid_prompt * loss, grid_prompt)):
            sums[index] += float((mass * values).sum())
    return {
        "executed_fraction": sums[0] / sums[1],
        "seconds": sums[2],
        "loss_per_token": sums[3] / sums[4],
    }


def _means(domain: Ints, prompt: Ints, output: Ints) -> tuple[Floats, Floats, Floats]:
    """Expected executed fraction, seconds, and loss per token, given domain (in alphabetical order) and lengths."""
    length = np.log(prompt / 128)
    fraction = 0.70 - 0.05 * length + np.array([0.0, 0.04, -0.05])[domain]
    seconds = 0.02 + 1e-3 * prompt + 2e-6 * prompt**2 + 0.03 * output
    loss = 3.0 - 0.2 * length + np.array([0.0, -0.9, 0.2])[domain] + 0 * output
    return fraction, seconds, loss
