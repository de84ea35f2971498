"""What a forward executed, counted: the one definition. Engines that count for themselves are tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .costs import UnitCost

OUTCOMES = ("all", "some", "none", "rounded up")
ALL, SOME, NONE, ROUNDED_UP = range(len(OUTCOMES))


@dataclass(frozen=True)
class Counts:
    """Of one forward and each of its units, padding excluded; int64."""

    executed: Tensor
    """[units]: tokens that executed."""
    keys: Tensor
    """[units]: keys that these attended to, each token its own included."""
    calls: Tensor
    """[units, 4]: one of `OUTCOMES`: whether all tokens executed, some, none, or all because skipping costs more."""


def windows_of(costs: Sequence[UnitCost], device: torch.device | str = "cpu") -> Tensor | None:
    """[units, 1]: keys that a token of each unit attends to at most; None where no unit has a sliding window."""
    if all(cost.window is None for cost in costs):
        return None
    return torch.tensor([cost.window or 2**62 for cost in costs], device=device)[:, None]


def visible(contexts: Tensor, windows: Tensor | None) -> Tensor:
    """Keys that each token attends to where it executes: [units or 1, T], of those visible to it, [T]."""
    return contexts[None] if windows is None else torch.minimum(contexts[None], windows)


def count(gates: Tensor, contexts: Tensor, windows: Tensor | None, rounded_up: Tensor | None = None) -> Counts:
    """Count a forward: gates bool [units, T], keys visible to each token int64 [T] (0 for padding).

    `rounded_up` bool [units]: whose call executed whole whatever its router said. Does not wait for a device.
    """
    real = contexts > 0
    gates = gates & real
    executed = gates.sum(1)
    outcome = torch.where(executed >= real.sum(), ALL, torch.where(executed > 0, SOME, NONE))
    if rounded_up is not None:
        outcome = torch.where(rounded_up, ROUNDED_UP, outcome)
    keys = (gates * visible(contexts, windows)).sum(1)
    return Counts(executed, keys, torch.nn.functional.one_hot(outcome, len(OUTCOMES)))
