"""D-LLM's objective: every token is held to the same depth, by a weight that grows on a sine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .route import RouteObjective
from .schedule import linear


class TokenTargetObjective(RouteObjective):
    """Task loss + lambda(t) mean_tokens |mean_units executed - (1 - sparsity)|, lambda = coefficient sin(pi/2 t/T).

    Tokens that always execute (`selection.first_tokens`) and padding do not count; units that always execute do. With
    joint decisions the mean over units is D-LLM's mean over layers.
    """

    def penalty(self, step: int, approximated: Tensor, valid: Tensor | None) -> Tensor:
        state, config = self.model.routing_state, self.config
        depth = torch.stack([gate.float() for gate in state.forward.gates.values()]).mean(0)
        assert state.forward.contexts is not None
        counted = (state.forward.contexts > self.model.routing_config.selection.first_tokens).float()
        miss = (depth - (1 - config.sparsity)).abs()
        weight = config.coefficient * math.sin(math.pi / 2 * linear(0.0, 1.0, step, config.steps))
        return weight * (miss * counted).sum() / counted.sum().clamp(min=1)
