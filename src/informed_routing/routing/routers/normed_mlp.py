"""d -> width -> RMS norm -> SiLU -> 2, all in float32: D-LLM's router."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config.parts import RouterConfig
from .base import Router


class NormedMlpRouter(Router):
    """Starts at biases 0.1 and 2.0, as D-LLM does; its width is 512 whatever the model."""

    widest = True

    def __init__(self, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> None:
        super().__init__(config, hidden_size, forecaster_rank)
        self.norm = nn.RMSNorm(self.outer.in_features, eps=1e-6)
        with torch.no_grad():
            self.outer.bias.copy_(torch.tensor([0.1, 0.1 + config.execute_bias]))

    @classmethod
    def fitting_width(cls, hidden_size: int, forecaster_rank: int) -> int:
        return 512

    def hidden(self, x: Tensor) -> Tensor:
        assert self.inner is not None
        with torch.autocast(x.device.type, enabled=False):
            inner = F.linear(x.float(), self.inner.weight.float(), self.inner.bias.float())
            return F.silu(F.rms_norm(inner, self.norm.normalized_shape, self.norm.weight.float(), self.norm.eps))


KIND = NormedMlpRouter
