"""Every second that a user sees is measured here.

What is timed takes turns (round robin), so that a machine that slows down slows all of it; the numbers are medians
with their extremes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from informed_routing.errors import InputError
from informed_routing.progress import NullProgress, Progress


@dataclass(frozen=True)
class Timing:
    """Seconds of one engine: median, extremes, and how many runs they come from."""

    median: float
    min: float
    max: float
    runs: int


@dataclass
class Workload:
    """Something to time. `prepare` runs outside the clock before each `run`, which gets what it returned."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        return self.run(self.prepare())


def measure(
    workloads: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time callables in turns: `warmup` unrecorded rounds, then `repeats` rounds of one run of each.

    Each round starts with another engine, so that none is always first. CUDA work is waited for. Raises
    InputError when there is nothing to time.
    """
    if not workloads or repeats < 1 or warmup < 0:
        raise InputError(f"{len(workloads)} engines, {repeats} repeats: nothing to time", "Give --repeats 1 or more")
    progress = progress or NullProgress()
    names = list(workloads)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _timed(workloads[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
        progress.advance(turn + 1)
    return {
        name: Timing(statistics.median(values), min(values), max(values), len(values))
        for name, values in seconds.items()
    }


def _timed(workload: Callable[[], Any]) -> float:
    state = workload.prepare() if isinstance(workload, Workload) else None
    _wait()
    start = time.perf_counter()
    if isinstance(workload, Workload):
        workload.run(state)
    else:
        workload()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
