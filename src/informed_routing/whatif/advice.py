"""How many nominal prompts a prediction needs."""

from __future__ import annotations

import math

DIRECT = 100  # times the present sample: beyond that, measuring the target itself is cheaper
CONSTANT = 4.074  # of n >= 4.074 d_2 log(2/delta) / e^2 at boundary B2 with a = 2


def prompts_needed(d2: float, error: float, delta: float, cells: int = 1) -> float:
    """Nominal prompts for an error of at most `error` (in units of the metric's range) with truncation at B2.

    4.074 d_2 log(2 K J / delta) / e^2, simultaneously over `cells` = K J predictions. inf when d_2 is.
    """
    return CONSTANT * d2 * math.log(2 * cells / delta) / error**2


def advise(prompts: int, d2: float, error: float, delta: float, cells: int, outside: float) -> str:
    """One line for a prediction that is not good enough; `error` in units of the metric's range."""
    if outside > 1e-3:
        return "widen the nominal workload to hold this target, or measure the target directly"
    needed = prompts_needed(d2, error, delta, cells)
    if not needed <= DIRECT * max(prompts, 30):
        return "measure this target directly"
    more = max(math.ceil(needed) - prompts, 0)
    return f"measure about {_round(more)} more nominal prompts" if more else "the number of prompts suffices"


def _round(number: int) -> int:
    """Two significant digits, upwards."""
    unit = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // unit) * unit
