"""Execute where the margin is above a threshold: deterministic, causal, the rule of inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..dial import threshold_for
from ..margins import margin_of
from .base import NamedRule

if TYPE_CHECKING:
    from ...config.folder import RoutingConfig
    from ...config.parts import Budget
    from ..routed_unit import RoutedUnit


@dataclass(frozen=True)
class Threshold(NamedRule):
    """Execute where the margin is above `value`."""

    value: float = 0.0
    hard: ClassVar[bool] = True

    @property
    def threshold(self) -> float:
        return self.value

    def __call__(self, logits: Tensor) -> Tensor:
        return margin_of(logits) > self.value

    @classmethod
    def at(cls, config: RoutingConfig, units: Sequence[RoutedUnit], sparsity: float, budget: Budget) -> Threshold:
        """By the calibrated table. Raises InputError outside of it."""
        return cls(threshold_for(config, sparsity, budget))


KIND = Threshold
