"""Routers: per-token classifiers of a unit. The margin is logit(execute) - logit(approximate)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import RouterConfig
from ..errors import InputError

APPROXIMATE, EXECUTE = 0, 1
"""Class indices of the two logits (paper 3.1)."""

LOW_RANK_WIDTH = 16


def router_width(config: RouterConfig, hidden_size: int, forecaster_rank: int) -> int:
    """Hidden width of a router.

    The paper gives the MLP d/4 - 2r, so that router and forecaster together cost what the greedy baseline's
    d/4 router does. Where a small d leaves nothing, the router alone gets the baseline's width d/4.
    """
    if config.width is not None:
        if config.width > hidden_size:
            raise InputError(
                f"router width {config.width} is above the model's hidden size {hidden_size}",
                f"Choose a width up to {hidden_size}",
            )
        return config.width
    if config.kind == "low-rank":
        return min(LOW_RANK_WIDTH, hidden_size)
    budget = max(hidden_size // 4, 1)
    remaining = budget - 2 * forecaster_rank
    return remaining if remaining > 0 else budget


class Router(nn.Module):
    """d -> width -> 2 with ReLU (`mlp`), without (`low-rank`), or d -> 2 (`linear`)."""

    def __init__(self, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> None:
        super().__init__()
        self.kind = config.kind
        self.in_features = hidden_size
        if config.kind == "linear":
            self.inner = None
            self.outer = nn.Linear(hidden_size, 2)
        else:
            width = router_width(config, hidden_size, forecaster_rank)
            self.inner = nn.Linear(hidden_size, width)
            self.outer = nn.Linear(width, 2)
            nn.init.kaiming_uniform_(self.inner.weight, nonlinearity="relu" if config.kind == "mlp" else "linear")
            nn.init.zeros_(self.inner.bias)
        with torch.no_grad():
            # Start near indifference about tokens and in favour of executing: the model still works at step 0.
            self.outer.weight.mul_(0.1)
            self.outer.bias.copy_(torch.tensor([-0.5, 0.5]) * config.execute_bias)

    def hidden(self, x: Tensor) -> Tensor:
        """What the last layer reads: [..., width], or x itself for a linear router."""
        if self.inner is None:
            return x
        hidden = self.inner(x.to(self.inner.weight.dtype))
        return F.relu(hidden) if self.kind == "mlp" else hidden

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., 2] in float32 (class 1 executes): the last, small product is never in half precision."""
        hidden = self.hidden(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(hidden.float(), self.outer.weight.float(), self.outer.bias.float())

    def margin(self, x: Tensor) -> Tensor:
        """logit(execute) - logit(approximate): [...] float32."""
        logits = self(x)
        return logits[..., EXECUTE] - logits[..., APPROXIMATE]
