"""A scalar score that ranks the tokens of a sequence, and a causal predictor of who is chosen: MoD's router."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config.parts import RouterConfig
from .base import RouterForm
from .mlp import MlpRouter


class RankingRouter(MlpRouter):
    """A score w x + b, and logits (d -> width -> ReLU -> 2) of what a token alone tells about its place.

    The score also weighs the updates of the chosen tokens, by its sigmoid, which is how it learns; `execute_bias` is
    its start. The predictor reads its input without a gradient.
    """

    carriers = (1.0,)
    ranks = True

    def __init__(self, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> None:
        super().__init__(config.model_copy(update={"execute_bias": 0.0}), hidden_size, forecaster_rank)
        self.score_layer = nn.Linear(hidden_size, 1)
        with torch.no_grad():
            self.score_layer.weight.mul_(0.1)
            self.score_layer.bias.fill_(config.execute_bias)

    @classmethod
    def fitting_width(cls, hidden_size: int, forecaster_rank: int) -> int:
        return min(16, hidden_size)

    def score(self, x: Tensor) -> Tensor:
        """The rank score [...] in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.score_layer.weight.float(), self.score_layer.bias.float()).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())

    def form(self) -> RouterForm | None:  # type: ignore[override]
        """None: engines do not weigh updates."""
        return None


KIND = RankingRouter
