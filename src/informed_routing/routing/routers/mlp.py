"""d -> width -> ReLU -> 2: the paper's router (Eq. 7)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from .base import Router, RouterForm


class MlpRouter(Router):
    """Logits W2 relu(W1 x + b1) + b2."""

    carriers: ClassVar[tuple[float, ...]] = (1.0, -1.0)

    @classmethod
    def fitting_width(cls, hidden_size: int, forecaster_rank: int) -> int:
        """The paper's d/4 - 2r, so that router and forecaster together cost what the greedy baseline's d/4 router does.

        Where a small d leaves nothing, the router alone gets the baseline's width d/4.
        """
        budget = max(hidden_size // 4, 1)
        remaining = budget - 2 * forecaster_rank
        return remaining if remaining > 0 else budget

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(super().hidden(x))

    def form(self) -> RouterForm:
        return self._form(relu=True)


KIND = MlpRouter
