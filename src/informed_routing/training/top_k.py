"""MoD's objective: capacity is hard, so nothing has to hold the sparsity; causal predictors learn who is chosen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routing.decision import DecisionRule, TopK
from ..routing.rules.top_k import capacity_for
from .route import RouteObjective

PREDICTOR_WEIGHT = 0.1
"""Of the cross-entropy. The predictors' tensors are their own, so only the clipping of gradients sees it."""


class TopKObjective(RouteObjective):
    """Task loss under top-k of each sequence + binary cross-entropy of the causal predictors to who was chosen.

    Scores learn through the weight that they give the updates of chosen tokens; skipped tokens are really skipped.
    """

    def rule(self, step: int) -> DecisionRule:
        return TopK(capacity_for(self.model.units, self.config.sparsity))

    def penalty(self, step: int, approximated: Tensor, valid: Tensor | None) -> Tensor:
        state = self.model.routing_state
        losses = []
        for index, margin in state.forward.predictions.items():
            chosen = state.forward.gates[index].float()
            loss = F.binary_cross_entropy_with_logits(margin, chosen, reduction="none")
            losses.append(loss.mean() if valid is None else (loss * valid).sum() / valid.sum().clamp(min=1))
        return PREDICTOR_WEIGHT * torch.stack(losses).mean()
