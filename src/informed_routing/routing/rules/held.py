"""Execute where the margin is above a threshold that follows what the text has approximated so far.

Kinds of text differ in how many of their tokens are easy, so that one threshold realises another share in each. This
rule holds every unit to the share that it had of the calibration text, in each sequence on its own: the more of it is
missing, the easier the unit approximates. It is causal, and what it must know of earlier tokens is a count.

The stronger the gain, the closer the share, and the less a router may spend where a text is hard: docs/method.md has
what both are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ..dial import shares_by_unit
from ..history import History, Holding
from ..margins import margin_of
from .base import NamedRule
from .threshold import Threshold

if TYPE_CHECKING:
    from ...config.folder import RoutingConfig
    from ...config.parts import Budget
    from ..routed_unit import RoutedUnit

GAIN = 40.0
"""By how much of a margin a threshold moves for a share that is missed by one."""

SOFT = 4.0
"""Tokens by which the share of a text is taken to be held already: its first tokens decide little."""


def check_units(shares: Sequence[float], units: int) -> None:
    """Raises InputError unless there is a share for each unit of a model."""
    if len(shares) != units:
        raise InputError(f"{len(shares)} shares are held, the model has {units} units", "Give one for each unit")


@dataclass(frozen=True)
class Held(NamedRule):
    """A threshold plus `gain` (share t - a) / (t + SOFT), where a unit has approximated a of the t tokens before.

    `shares` [units] are those to be held, of tokens approximated. Raises InputError where it is not known what came
    before in a text, for shares that are none, or not one for each unit, and for a gain below 0.
    """

    base: Threshold
    shares: tuple[float, ...]
    gain: float = GAIN
    hard: ClassVar[bool] = True
    held: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if wrong := [share for share in self.shares if not 0 <= share <= 1]:
            raise InputError(f"{wrong[0]} is no share of tokens", "Give one from 0 to 1 for each unit")
        if not 0 <= self.gain < float("inf"):
            raise InputError(f"gain {self.gain} is not 0 or more", "Leave it out")

    @property
    def nominal(self) -> float:
        return self.base.nominal

    @property
    def holding(self) -> Holding:
        return Holding(self.shares, self.gain, SOFT)

    def limits(self, contexts: Tensor) -> Tensor:
        """The thresholds of texts that are just where their shares are."""
        return self.base.limits(contexts)

    def __call__(self, logits: Tensor) -> Tensor:
        raise InputError("the rule depends on what came before in a text", "Call decide_after(...)")

    def decide_after(self, logits: Tensor, unit: int, contexts: Tensor | None, history: History | None) -> Tensor:
        if contexts is None or history is None:
            raise InputError("a held rule decides about tokens of a text, one after the other", "Call the whole model")
        check_units(self.shares, len(history.approximated))
        margins, limits = margin_of(logits).detach().float().cpu(), self.limits(contexts).cpu()
        count, share = history.approximated[unit], torch.tensor(self.shares[unit])
        before, real = (contexts - 1).float().cpu(), (contexts > 0).cpu()
        gates = []
        for t in range(margins.shape[1]):
            moved = self.gain * (share * before[:, t] - count.float()) / (before[:, t] + SOFT)
            gate = margins[:, t] > limits[:, t] + moved
            count += (real[:, t] & ~gate).int()
            gates.append(gate)
        return torch.stack(gates, dim=1).to(logits.device)

    @classmethod
    def at(cls, config: RoutingConfig, units: Sequence[RoutedUnit], sparsity: float, budget: Budget) -> Held:
        """By the calibrated table. Raises InputError outside of it, and for tables of earlier versions."""
        return cls(Threshold.at(config, units, sparsity, budget), shares_by_unit(config, sparsity, budget))


KIND = Held
