"""Execute where the margin is above a threshold: deterministic, causal, the rule of inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...config.folder import ByContext, contexts_rise
from ...errors import InputError
from ..dial import threshold_for, thresholds_by_context
from ..margins import margin_of
from .base import NamedRule

if TYPE_CHECKING:
    from ...config.folder import RoutingConfig
    from ...config.parts import Budget
    from ..routed_unit import RoutedUnit


@dataclass(frozen=True)
class Threshold(NamedRule):
    """Execute where the margin is above `value`, or above a threshold that depends on how much a token sees.

    `by_context` has (context, threshold) pairs: for tokens that see so many keys or more, themselves included, up to
    the next pair. That is known when a token comes, so that a cached text is decided as a whole one. Raises InputError
    for contexts that do not begin with 1 and rise.
    """

    value: float = 0.0
    by_context: ByContext = ()
    hard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.by_context and not contexts_rise([context for context, _ in self.by_context]):
            raise InputError("the contexts of a threshold are no ranges", "Begin with 1, then rise")

    @property
    def threshold(self) -> float | None:
        return None if self.by_context else self.value

    @property
    def by_margin(self) -> bool:
        return True

    @property
    def nominal(self) -> float:
        return self.value

    def limits(self, contexts: Tensor) -> Tensor:
        if not self.by_context:
            return super().limits(contexts)
        begins, thresholds = zip(*self.by_context, strict=True)
        further = torch.tensor(begins[1:], device=contexts.device)
        found = torch.tensor(thresholds, dtype=torch.float32, device=contexts.device)
        return found[torch.bucketize(contexts.contiguous(), further, right=True)]

    def __call__(self, logits: Tensor) -> Tensor:
        if self.by_context:
            raise InputError("the rule differs between contexts", "Call decide(logits, unit, contexts)")
        return margin_of(logits) > self.value

    def decide(self, logits: Tensor, unit: int, contexts: Tensor | None = None) -> Tensor:
        if not self.by_context or contexts is None:
            return self(logits)
        return margin_of(logits) > self.limits(contexts)

    @classmethod
    def at(cls, config: RoutingConfig, units: Sequence[RoutedUnit], sparsity: float, budget: Budget) -> Threshold:
        """By the calibrated table. Raises InputError outside of it."""
        return cls(threshold_for(config, sparsity, budget), thresholds_by_context(config, sparsity, budget))


KIND = Threshold
