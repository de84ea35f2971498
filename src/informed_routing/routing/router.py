"""Routers: per-token classifiers of a unit. The margin is logit(execute) - logit(approximate)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.parts import RouterConfig
from ..errors import InputError

APPROXIMATE, EXECUTE = 0, 1
"""Class indices of the two logits (paper 3.1)."""

LOW_RANK_WIDTH = 16

NORMED_MLP_WIDTH = 512
"""D-LLM's, whatever the model."""


def router_width(config: RouterConfig, hidden_size: int, forecaster_rank: int) -> int:
    """Hidden width of a router.

    The paper gives the MLP d/4 - 2r, so that router and forecaster together cost what the greedy baseline's
    d/4 router does. Where a small d leaves nothing, the router alone gets the baseline's width d/4.
    """
    if config.width is not None:
        if config.width > hidden_size and config.kind != "normed-mlp":
            raise InputError(
                f"router width {config.width} is above the model's hidden size {hidden_size}",
                f"Choose a width up to {hidden_size}",
            )
        return config.width
    if config.kind in ("low-rank", "ranking"):
        return min(LOW_RANK_WIDTH, hidden_size)
    if config.kind == "normed-mlp":
        return NORMED_MLP_WIDTH
    budget = max(hidden_size // 4, 1)
    remaining = budget - 2 * forecaster_rank
    return remaining if remaining > 0 else budget


def make_router(config: RouterConfig, hidden_size: int, forecaster_rank: int) -> Router:
    """A fresh router of the configured kind. Raises InputError for a width above `hidden_size`."""
    if config.kind == "normed-mlp":
        return NormedMlpRouter(config, hidden_size, forecaster_rank)
    if config.kind == "ranking":
        return RankingRouter(config, hidden_size, forecaster_rank)
    return Router(config, hidden_size, forecaster_rank)


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
            nn.init.kaiming_uniform_(self.inner.weight, nonlinearity="linear" if config.kind == "low-rank" else "relu")
            nn.init.zeros_(self.inner.bias)
        with torch.no_grad():
            if config.init == "kaiming":
                nn.init.kaiming_uniform_(self.outer.weight, nonlinearity="linear")
            else:
                # Start near indifference about tokens and in favour of executing: the model still works at step 0.
                self.outer.weight.mul_(0.1)
            self.outer.bias.copy_(torch.tensor([-0.5, 0.5]) * config.execute_bias)

    def hidden(self, x: Tensor) -> Tensor:
        """What the last layer reads: [..., width], or x itself for a linear router."""
        if self.inner is None:
            return x
        hidden = self.inner(x.to(self.inner.weight.dtype))
        return hidden if self.kind == "low-rank" else F.relu(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., 2] in float32 (class 1 executes): the last, small product is never in half precision."""
        hidden = self.hidden(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(hidden.float(), self.outer.weight.float(), self.outer.bias.float())

    def margin(self, x: Tensor) -> Tensor:
        """logit(execute) - logit(approximate): [...] float32."""
        logits = self(x)
        return logits[..., EXECUTE] - logits[..., APPROXIMATE]


class NormedMlpRouter(Router):
    """d -> width -> RMS norm -> SiLU -> 2, all in float32 (D-LLM, which starts at biases 0.1 and 2.0)."""

    def __init__(self, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> None:
        super().__init__(config, hidden_size, forecaster_rank)
        self.norm = nn.RMSNorm(self.outer.in_features, eps=1e-6)
        with torch.no_grad():
            self.outer.bias.copy_(torch.tensor([0.1, 0.1 + config.execute_bias]))

    def hidden(self, x: Tensor) -> Tensor:
        assert self.inner is not None
        with torch.autocast(x.device.type, enabled=False):
            inner = F.linear(x.float(), self.inner.weight.float(), self.inner.bias.float())
            return F.silu(F.rms_norm(inner, self.norm.normalized_shape, self.norm.weight.float(), self.norm.eps))


class RankingRouter(Router):
    """A scalar score w x + b that ranks the tokens of a sequence, and a causal predictor of who is chosen (MoD).

    The score also weighs the updates of the chosen tokens, by its sigmoid, which is how it learns; `execute_bias` is
    its start. The predictor (d -> width -> ReLU -> 2) gives this router's logits: what a token alone tells about its
    place in the ranking. It reads its input without a gradient.
    """

    def __init__(self, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> None:
        super().__init__(config.model_copy(update={"execute_bias": 0.0}), hidden_size, forecaster_rank)
        self.score_layer = nn.Linear(hidden_size, 1)
        with torch.no_grad():
            self.score_layer.weight.mul_(0.1)
            self.score_layer.bias.fill_(config.execute_bias)

    def score(self, x: Tensor) -> Tensor:
        """The rank score [...] in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.score_layer.weight.float(), self.score_layer.bias.float()).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())
