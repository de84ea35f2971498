"""Divergences of exponential and normal laws in closed form; log-normal ones are normal in the logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ....whatif.arrays import Floats
from ....whatif.ratio_law import RatioLaw


@dataclass(frozen=True)
class ExponentialPair:
    """Nominal rate q, target rate p < q: w is exactly Pareto with scale p/q and index q / (q - p)."""

    nominal_rate: float
    target_rate: float

    @property
    def scale(self) -> float:
        """The smallest w."""
        return self.target_rate / self.nominal_rate

    @property
    def tail_index(self) -> float:
        """alpha with Q(w > t) = (t / scale)^-alpha."""
        return self.nominal_rate / (self.nominal_rate - self.target_rate)

    def log_w(self, x: Floats) -> Floats:
        """log p(x) - log q(x)."""
        return math.log(self.scale) + (self.nominal_rate - self.target_rate) * x

    def tail(self, t: Floats | float) -> Floats:
        """Q(w > t)."""
        return np.minimum((np.asarray(t) / self.scale) ** -self.tail_index, 1.0)

    def moment(self, order: float) -> float:
        """v_a = E_Q[w^a]; inf from the tail index on."""
        rest = self.nominal_rate - order * (self.nominal_rate - self.target_rate)
        return self.scale**order * self.nominal_rate / rest if rest > 0 else math.inf

    def lost_mass(self, boundary: float) -> float:
        """tau_M = integral of Q(w > t) over t > M, for M >= scale."""
        return boundary * float(self.tail(boundary)) / (self.tail_index - 1)


@dataclass(frozen=True)
class NormalPair:
    """Nominal N(nominal_mean, nominal_sd^2), target N(target_mean, target_sd^2)."""

    nominal_mean: float
    nominal_sd: float
    target_mean: float
    target_sd: float

    @property
    def tail_index(self) -> float:
        """alpha = sp^2 / (sp^2 - sq^2) of a wider target; inf of one that is not."""
        p, q = self.target_sd**2, self.nominal_sd**2
        return p / (p - q) if p > q else math.inf

    def log_densities(self, x: Floats) -> tuple[Floats, Floats]:
        """log p(x), log q(x)."""
        return normal_log_density(x, self.target_mean, self.target_sd), normal_log_density(
            x, self.nominal_mean, self.nominal_sd
        )

    def log_w(self, x: Floats) -> Floats:
        """log p(x) - log q(x)."""
        log_p, log_q = self.log_densities(x)
        return log_p - log_q

    def moment(self, order: float) -> float:
        """v_a = exp((a - 1) D_a); inf where order * sq^2 + (1 - order) * sp^2 is not positive."""
        mixed = order * self.nominal_sd**2 + (1 - order) * self.target_sd**2
        if mixed <= 0:
            return math.inf
        renyi = (
            math.log(self.nominal_sd / self.target_sd)
            + math.log(self.nominal_sd**2 / mixed) / (2 * (order - 1))
            + order * (self.target_mean - self.nominal_mean) ** 2 / (2 * mixed)
        )
        return math.exp((order - 1) * renyi)

    @property
    def kl(self) -> float:
        """KL(P || Q) in nats."""
        spread = self.target_sd**2 + (self.target_mean - self.nominal_mean) ** 2
        return math.log(self.nominal_sd / self.target_sd) + spread / (2 * self.nominal_sd**2) - 0.5


def normal_log_density(x: Floats, mean: Floats | float, sd: float) -> Floats:
    """log N(x; mean, sd^2)."""
    return -0.5 * ((x - mean) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)


def law_of_densities(log_p: Floats, log_q: Floats, spacing: float) -> RatioLaw:
    """From log densities on an even grid of one variable that reaches far into both tails (trapezoidal rule)."""
    return RatioLaw.of_atoms(log_p + np.log(spacing), log_q + np.log(spacing))
