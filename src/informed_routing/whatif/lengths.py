"""Distributions of token counts: log-normal or tabulated, on a finite set of integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ..config.types import Frozen as _Frozen
from ..extras import need
from .arrays import Floats, Ints

LONGEST = 2**20  # tokens; a distribution keeps one number per length
MASS_TOLERANCE = 1e-6  # by how much probabilities that a user writes may miss one


class Frozen(_Frozen):
    """Settings of a workload or a metric."""

    def __eq__(self, other: object) -> bool:
        """By settings; what is cached are arrays, which have no single truth."""
        if type(self) is not type(other):
            return False
        return all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields)


class LengthLaw(Frozen, ABC):
    """A probability mass function on `first`, `first` + 1, ...; sub-classes say how it is made."""

    @property
    @abstractmethod
    def first(self) -> int:
        """The shortest length of `log_mass`."""

    @property
    @abstractmethod
    def log_mass(self) -> Floats:
        """Log probabilities of `first`, `first` + 1, ...: float64 [lengths], -inf where impossible."""

    @cached_property
    def support(self) -> Ints:
        """The possible lengths, ascending: int64 [support]."""
        return self.first + np.flatnonzero(np.isfinite(self.log_mass))

    @cached_property
    def mean(self) -> float:
        """Expected length."""
        return float(self.support @ np.exp(self.log_mass[self.support - self.first]))

    @cached_property
    def _cumulative(self) -> Floats:
        total = np.cumsum(np.exp(self.log_mass[self.support - self.first]))
        return total / total[-1]

    def log_pmf(self, lengths: Ints) -> Floats:
        """Log probability of each length, of the shape of `lengths`; -inf outside the support."""
        position = np.asarray(lengths, dtype=np.int64) - self.first
        inside = (position >= 0) & (position < len(self.log_mass))
        return np.where(inside, self.log_mass[np.where(inside, position, 0)], -np.inf)

    def sample(self, size: int, rng: np.random.Generator) -> Ints:
        """Independent draws: int64 [size]."""
        return self.support[np.searchsorted(self._cumulative, rng.random(size), side="right")]


class LogNormalLengths(LengthLaw):
    """A log-normal rounded to integers, pmf(k) proportional to F(k + 1/2) - F(k - 1/2) on [minimum, maximum]."""

    median: float = Field(gt=0, description="tokens, before the cut to [minimum, maximum]")
    sigma: float = Field(gt=0, description="standard deviation of the log length")
    minimum: int = Field(1, ge=1, le=LONGEST)
    maximum: int = Field(ge=1, le=LONGEST)

    @model_validator(mode="after")
    def _ordered(self) -> LogNormalLengths:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        if self.sigma < 1e-6:
            raise ValueError(f"sigma {self.sigma} is below 0.000001: write one length as an integer")
        if not np.isfinite(self.log_mass).any():
            raise ValueError("no mass is left between minimum and maximum")
        return self

    @cached_property
    def first(self) -> int:
        return self.minimum

    @cached_property
    def log_mass(self) -> Floats:
        edges = np.arange(self.minimum, self.maximum + 2) - 0.5
        z = (np.log(edges) - np.log(self.median)) / self.sigma
        whole = _log_normal_interval(z[[0]], z[[-1]])
        return _log_normal_interval(z[:-1], z[1:]) - whole


class TabulatedLengths(LengthLaw):
    """Any finite distribution, written as a table from length to probability."""

    probabilities: dict[Annotated[int, Field(ge=0, le=LONGEST)], Annotated[float, Field(ge=0)]]

    @model_validator(mode="after")
    def _sums_to_one(self) -> TabulatedLengths:
        check_total(self.probabilities.values(), "probabilities")
        return self

    @cached_property
    def first(self) -> int:
        return min(length for length, mass in self.probabilities.items() if mass > 0)

    @cached_property
    def log_mass(self) -> Floats:
        mass = np.zeros(max(self.probabilities) - self.first + 1)
        for length, probability in self.probabilities.items():
            if probability > 0:
                mass[length - self.first] = probability
        with np.errstate(divide="ignore"):
            return np.log(mass) - np.log(mass.sum())


def check_total(weights: Iterable[float], what: str) -> None:
    """Raises ValueError when weights do not sum to one."""
    total = sum(weights)
    if not abs(total - 1) <= MASS_TOLERANCE:
        raise ValueError(f"{what} sum to {total:.6g}, not to 1")


def _log_normal_interval(low: Floats, high: Floats) -> Floats:
    """log(Phi(high) - Phi(low)), on the side of the distribution where it is accurate far into the tail."""
    need("scipy", extra="whatif", for_what="Log-normal lengths")
    from scipy.special import log_ndtr

    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    upper, lower = log_ndtr(high), log_ndtr(low)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(upper > lower, upper + np.log1p(-np.exp(lower - upper)), -np.inf)


def _constant(value: Any) -> Any:
    return {"probabilities": {value: 1.0}} if isinstance(value, int) and not isinstance(value, bool) else value


def holds(value: Any, key: str) -> bool:
    """Whether settings, or a model made of settings, have a key: it tells two kinds of settings apart."""
    return key in value if isinstance(value, Mapping) else hasattr(value, key)


def _kind(value: Any) -> str:
    return "<table>" if holds(value, "probabilities") else "<log-normal>"


Lengths = Annotated[
    Annotated[LogNormalLengths, Tag("<log-normal>")] | Annotated[TabulatedLengths, Tag("<table>")],
    Discriminator(_kind),
    BeforeValidator(_constant),
]
"""Settings of a length distribution: those of a log-normal, a table, or one integer (always this length)."""
