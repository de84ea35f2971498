"""The law of the likelihood ratio w = p/q, from the input distributions alone.

Truncation needs moments and lost mass of w. They depend on no output of the expensive system, so they are computed
exactly, by enumeration of a discrete support, or, where that is not possible, from inexpensive draws of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .arrays import Floats
from .workloads import InputLaw

ENUMERABLE = 2**21  # atoms of a support that is enumerated
DRAWS = 2**17  # inputs drawn from each of the two laws where it is not
ROUNDING = 1e-10  # target mass outside the support that sums of probabilities may show for nothing
STANDARD_ERRORS = 4.0  # by which a lost mass from draws is raised, so that it stays an upper bound


@dataclass(frozen=True)
class RatioLaw:
    """Atoms of (log q, log p), descending in w. Target mass where q = 0 is in `outside`, not among the atoms.

    Made by `of_atoms`, `of_draws`, or `NominalSupport` from workloads.
    """

    log_q: Floats  # [atoms]
    log_p: Floats  # [atoms]
    outside: float
    draws: int = 0  # atoms are this many random draws; 0: they are the support
    largest: float = 0.0  # of draws: the bound of target mass per atom, times the number of draws

    @cached_property
    def log_w(self) -> Floats:
        """log p - log q of the atoms, descending."""
        return self.log_p - self.log_q

    @cached_property
    def _above(self) -> tuple[Floats, Floats, Floats]:
        """By number of atoms above a boundary: target mass, nominal mass, and E_Q[w^2; the atoms below]."""
        target = np.concatenate([[0.0], np.cumsum(np.exp(self.log_p))])
        nominal = np.concatenate([[0.0], np.cumsum(np.exp(self.log_q))])
        with np.errstate(over="ignore"):
            squares = np.exp(self.log_p + self.log_w)
        below = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        return target, nominal, below

    def _count_above(self, boundary: Floats) -> np.ndarray:
        return np.searchsorted(-self.log_w, -np.log(boundary), side="left")

    def lost_mass(self, boundary: Floats | float) -> Floats:
        """tau_M = 1 - E_Q[min(w, M)]: the target mass that truncation at M (and q = 0) loses; shape of `boundary`.

        From draws, it is raised by four standard errors to an upper bound.
        """
        boundary = np.asarray(boundary, dtype=np.float64)
        count = self._count_above(boundary)
        target, nominal, _ = self._above
        lost = self.outside + np.maximum(target[count] - boundary * nominal[count], 0.0)
        if self.draws:  # Bernstein
            share = self.largest * STANDARD_ERRORS**2 / self.draws
            lost = lost + np.sqrt(lost * share) + share / 3
        return np.minimum(lost, 1.0)

    def clipped_second_moment(self, boundary: Floats | float) -> Floats:
        """E_Q[min(w, M)^2], of the shape of `boundary`."""
        boundary = np.asarray(boundary, dtype=np.float64)
        count = self._count_above(boundary)
        _, nominal, below = self._above
        return below[count] + boundary**2 * nominal[count]

    @cached_property
    def d2(self) -> float:
        """E_Q[w^2], the exponential of the Renyi divergence of order 2, over what q reaches."""
        return float(self._above[2][0])

    @cached_property
    def kl(self) -> float:
        """KL(P || Q) in nats over what q reaches; read it beside `outside`."""
        return float(np.sum(np.exp(self.log_p) * self.log_w))

    @classmethod
    def of_atoms(cls, log_p: Floats, log_q: Floats, outside: float | None = None) -> RatioLaw:
        """From the log masses of all points; `outside` is summed from the points with q = 0 unless it is given."""
        reached = np.isfinite(log_q)
        if outside is None:
            outside = float(np.exp(log_p[~reached]).sum())
        return cls._sorted(log_p[reached], log_q[reached], outside)

    @classmethod
    def of_draws(cls, log_p: Floats, log_q: Floats, log_drawn: Floats) -> RatioLaw:
        """From log densities at independent draws from a law, `log_drawn` its own, that is positive where p or q is."""
        drawn = log_drawn + np.log(len(log_drawn))
        law = cls.of_atoms(log_p - drawn, log_q - drawn)
        return replace(law, draws=len(drawn), largest=float(np.exp((log_p - log_drawn).max())))

    @classmethod
    def _sorted(cls, log_p: Floats, log_q: Floats, outside: float) -> RatioLaw:
        possible = np.isfinite(log_p)  # the others have w = 0 and change nothing
        log_p, log_q = log_p[possible], log_q[possible]
        order = np.argsort(log_q - log_p, kind="stable")
        return cls(log_q[order], log_p[order], max(outside, 0.0))


class NominalSupport:
    """The nominal workload's support, kept so that many targets can be compared with it."""

    def __init__(self, nominal: InputLaw, seed: int = 0) -> None:
        self.nominal = nominal
        self._grids = nominal.support()
        self.atoms = sum(len(prompt) * len(output) for prompt, output in self._grids.values())
        self._seed = seed

    @cached_property
    def _log_q(self) -> Floats:
        return np.concatenate([self.nominal.log_grid(name, *grid).ravel() for name, grid in self._grids.items()])

    @cached_property
    def _log_tokens(self) -> Floats:
        return np.log(np.concatenate([np.add.outer(*grid).ravel() for grid in self._grids.values()]))

    def ratio_laws(self, target: InputLaw, by_tokens: bool = False) -> tuple[RatioLaw, ...]:
        """The exact law of p/q and, with `by_tokens`, that of p'/q, p' counting each prompt by its tokens.

        p' = p * tokens / E_P[tokens] is the target of ratios per token. By enumeration, or from draws when the support
        has more than `ENUMERABLE` points.
        """
        if self.atoms > ENUMERABLE:
            return self._drawn(target, by_tokens)
        log_p = np.concatenate([target.log_grid(name, *grid).ravel() for name, grid in self._grids.items()])
        weighted = [log_p]
        if by_tokens:
            weighted.append(log_p + self._log_tokens - np.log(target.mean_tokens()))
        return tuple(RatioLaw.of_atoms(each, self._log_q, self._missed(each)) for each in weighted)

    def _missed(self, log_p: Floats) -> float:
        outside = 1.0 - float(np.exp(log_p[np.isfinite(self._log_q)]).sum())
        return outside if outside > ROUNDING else 0.0

    def _drawn(self, target: InputLaw, by_tokens: bool) -> tuple[RatioLaw, ...]:
        """From as many draws of p as of q: then no mass is more than twice its share, however far p is from q."""
        rng = np.random.default_rng(self._seed)
        drawn = [target.sample(DRAWS, rng), self.nominal.sample(DRAWS, rng)]
        log_p = np.concatenate([target.log_density(inputs) for inputs in drawn])
        log_q = np.concatenate([self.nominal.log_density(inputs) for inputs in drawn])
        log_drawn = np.logaddexp(log_p, log_q) - np.log(2)
        weighted = [log_p]
        if by_tokens:
            tokens = np.concatenate([inputs.tokens for inputs in drawn])
            weighted.append(log_p + np.log(tokens) - np.log(target.mean_tokens()))
        return tuple(RatioLaw.of_draws(each, log_q, log_drawn) for each in weighted)
