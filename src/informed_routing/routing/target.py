"""What training is held to: a share of units, of MACs or of measured time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.folder import LatencyGains
from ..config.parts import Budget
from ..errors import InputError
from .costs import UnitCost
from .state import KeyValues


class BudgetMeter:
    """The differentiable share that training holds to its target (paper Eq. 5 and 8; `macs`, `latency` are ours).

    `gains` is the measured table that a latency budget needs. With `kv` = drop, MACs of keys and values count as saved,
    and those of scores as if evicted keys were still attended to: less than what is really saved.
    """

    def __init__(
        self,
        costs: list[UnitCost],
        kinds: Sequence[str],
        budget: Budget,
        context: float,
        gains: LatencyGains | None = None,
        kv: KeyValues = "keep",
    ) -> None:
        self.kinds, self.budget = kinds, budget
        dense = torch.tensor([c.dense(context) for c in costs], dtype=torch.float32)
        if budget == "units":
            self.weights = torch.full((len(costs),), 1.0 / len(costs))
            self.overhead = 0.0
        elif budget == "macs":
            kept = [0.0 if kv == "drop" or c.static else c.kept(context) for c in costs]
            gain = torch.tensor(
                [c.dense(context) - own - c.forecaster for c, own in zip(costs, kept, strict=True)], dtype=torch.float32
            )
            self.weights = gain / dense.sum()
            self.overhead = float(sum(c.router for c in costs) / dense.sum())
        elif budget == "latency":
            if gains is None:
                raise InputError("a latency budget needs a measured table", "Use `fit --budget latency`")
            count = {kind: sum(k == kind for k in kinds) for kind in kinds}
            self.weights = torch.tensor([getattr(gains, kind) / count[kind] for kind in kinds])
            self.overhead = gains.overhead
        else:
            raise InputError(f"budget {budget!r} is not known", "Choose units, macs or latency")

    def saved(self, approximated: Tensor) -> Tensor:
        """Budget share saved by approximated shares [U] of the units."""
        return (approximated * self.weights.to(approximated.device)).sum() - self.overhead

    def attainable(self, eligible: Tensor | None = None) -> float:
        """The share saved if everything were approximated: no target may lie above it.

        `eligible` [U]: the share of its tokens that each unit may approximate; default all.
        """
        return float((self.weights if eligible is None else self.weights * eligible).sum()) - self.overhead

    def deviation(self, approximated: Tensor, target: float, balanced: bool) -> Tensor:
        """|saved - target|, or its sum over the two kinds of unit, each held to the target on its own."""
        if not balanced:
            return (self.saved(approximated) - target).abs()
        total = approximated.new_zeros(())
        for kind in ("attention", "ffn"):
            picked = torch.tensor([k == kind for k in self.kinds], device=approximated.device)
            total = total + (approximated[picked].mean() - target).abs()
        return total
