"""Where likelihood ratios w are truncated to min(w, M), with L = log(1/delta) per side."""

from __future__ import annotations

import math

import numpy as np

from .arrays import Floats
from .ratio_law import RatioLaw


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
