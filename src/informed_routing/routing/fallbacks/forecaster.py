"""The Lightweight Feature Forecaster.

It predicts the *update* that its unit adds to the residual, so `h + F(norm(h))` is right in scale. The paper's text
asks for the normalised output and its Eq. 6 adds the forecast to the residual; only a forecast of the update satisfies
both, since a normalised one would lose the scale that the sum needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config.parts import ForecasterConfig
from ...errors import InputError
from .base import Fallback, LowRankForm

if TYPE_CHECKING:
    from ..closed_form import ClosedForm


class Forecaster(Fallback):
    """W2 act(W1 x + b1) + b2: [..., d] -> [..., d], rank r (paper Eq. 6)."""

    def __init__(self, width: int, rank: int, activation: str = "none") -> None:
        super().__init__()
        self.rank = rank
        self.inner = nn.Linear(width, rank)
        self.outer = nn.Linear(rank, width)
        self.activation = activation
        # Small weights: an unfitted forecaster is almost greedy routing, as in the published code.
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, std=1e-3)
            nn.init.zeros_(linear.bias)

    @classmethod
    def check(cls, config: ForecasterConfig, hidden_size: int) -> None:
        if config.rank > hidden_size:
            raise InputError(
                f"rank {config.rank} is above the model's hidden size {hidden_size}",
                f"Choose a rank up to {hidden_size}",
            )

    @classmethod
    def make(cls, config: ForecasterConfig, hidden_size: int) -> Forecaster:
        return cls(hidden_size, config.rank, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        mixes = torch.is_autocast_enabled(x.device.type)  # and then takes both in its own dtype
        hidden = self.inner(x if mixes else x.to(self.inner.weight.dtype))
        if self.activation == "silu":
            hidden = F.silu(hidden)
        return self.outer(hidden).to(x.dtype)

    def take(self, solution: ClosedForm) -> None:
        """Copy the best solution of this rank."""
        with torch.no_grad():
            self.inner.weight.copy_(solution.inner[: self.rank])
            self.inner.bias.copy_(solution.inner_bias[: self.rank])
            self.outer.weight.copy_(solution.outer[:, : self.rank])
            self.outer.bias.copy_(solution.outer_bias)

    def form(self) -> LowRankForm:
        inner, outer = self.inner, self.outer
        return LowRankForm(
            inner.weight.detach(),
            inner.bias.detach(),
            outer.weight.detach(),
            outer.bias.detach(),
            silu=self.activation == "silu",
        )


KIND = Forecaster
