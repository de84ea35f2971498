"""Counts of what was executed, kept on the device and read only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...routing.costs import UnitCost
from ...routing.counts import OUTCOMES, count, windows_of
from ...routing.stats import RoutingStats


class DeviceCounts:
    """Executed tokens, keys read by them, and outcomes of calls, per unit; see RoutingStats."""

    def __init__(self, costs: Sequence[UnitCost], device: torch.device) -> None:
        units = len(costs)
        with torch.inference_mode(False):  # an engine may be made in a forward, and is read after it
            self.executed = torch.zeros(units, dtype=torch.float64, device=device)
            self.keys = torch.zeros(units, dtype=torch.float64, device=device)
            self.calls = torch.zeros(units, len(OUTCOMES), dtype=torch.float64, device=device)
        self.windows = windows_of(costs, device)
        self.owner: RoutingStats | None = None

    def add(self, gates: Tensor, contexts: Tensor, rounded_up: Tensor) -> None:
        """Count a forward: gates [units, T] bool, keys visible to each token [T] (0 for padding), forced units [units].

        Does not wait for the device.
        """
        found = count(gates, contexts, self.windows, rounded_up)
        self.executed += found.executed
        self.keys += found.keys
        self.calls += found.calls

    def belong_to(self, stats: RoutingStats) -> None:
        """Count for `stats` from now on."""
        if self.owner is not stats:
            if self.owner is not None:
                self.owner.settle()
                self.owner.elsewhere = None
            self.owner = stats
            stats.elsewhere = self.move_to

    def move_to(self, stats: RoutingStats) -> None:
        """Add what was counted to `stats` and begin anew."""
        with torch.inference_mode():  # `stats` may have been made in it
            for mine, theirs in self._pairs(stats):
                theirs += mine.cpu()
                mine.zero_()

    def state(self) -> list[Tensor]:
        """A copy of the counts, to go back to."""
        return [part.clone() for part in (self.executed, self.keys, self.calls)]

    def restore(self, state: list[Tensor]) -> None:
        """Go back to counts that `state` gave."""
        for mine, before in zip((self.executed, self.keys, self.calls), state, strict=True):
            mine.copy_(before)

    def _pairs(self, stats: RoutingStats) -> tuple[tuple[Tensor, Tensor], ...]:
        return (
            (self.executed, stats.executed),
            (self.keys, stats.executed_keys),
            (self.calls, stats.calls),
        )
