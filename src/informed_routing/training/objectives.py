"""Losses on hidden states. The LM head is applied in chunks, so [tokens, vocabulary] never exists at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.recipe import ObjectiveConfig
from ..execution.cpu import fused
from ..models.head import Head

CHUNK = 256
"""Rows per chunk: 50 MB of float32 logits at a vocabulary of 50k."""


class _ChunkedSum(torch.autograd.Function):
    """Sum over rows of a loss on logits, with the gradient to the hidden states computed on the way.

    The head's own weights get no gradient: they are frozen in every stage.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, score: Callable[[Tensor, slice], Tensor]) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_()
                loss = score(part, rows)
            gradient[rows] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None


def next_token_loss(
    hidden: Tensor,
    input_ids: Tensor,
    head: Head,
    objective: ObjectiveConfig,
    teacher_hidden: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of predicting each next token from hidden states [B, N, d] and ids [B, N].

    `lm`: cross-entropy to the text. `distill`: KL divergence from the dense model, whose last hidden states are
    `teacher_hidden`. `mixed`: weighted sum. Pairs with padding (`valid` false) do not count.
    """
    width = hidden.shape[-1]
    keep = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    if valid is not None:
        keep = (valid[:, 1:] & valid[:, :-1]).bool()
    rows = hidden[:, :-1][keep].reshape(-1, width)
    targets = input_ids[:, 1:][keep]
    distill = {"lm": 0.0, "distill": 1.0, "mixed": objective.distill_weight}[objective.kind]
    teacher = None
    if distill:
        if teacher_hidden is None:
            raise ValueError("distillation needs the dense model's hidden states")
        teacher = teacher_hidden[:, :-1][keep].reshape(-1, width)

    if fused_losses(head, hidden):
        weight = cast(Tensor, head.weight)
        wanted = None if teacher is None else teacher.to(weight.dtype)
        total = fused.token_losses(rows.to(weight.dtype), weight, targets, wanted, distill)
        return total if reduction == "sum" else total / max(rows.shape[0], 1)

    def score(part: Tensor, chunk: slice) -> Tensor:
        logits = head(part)
        loss = logits.new_zeros(())
        if distill < 1:
            loss = loss + (1 - distill) * F.cross_entropy(logits, targets[chunk], reduction="sum")
        if teacher is not None:
            with torch.no_grad():
                wanted = head(teacher[chunk]).log_softmax(-1)
            loss = loss + distill * F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        return loss

    total = cast(Tensor, _ChunkedSum.apply(rows, score))
    return total if reduction == "sum" else total / max(rows.shape[0], 1)


def fused_losses(head: Head, hidden: Tensor) -> bool:
    """Whether the engine computes losses from logits in bfloat16, which its fused units go with."""
    weight = head.weight if hidden.device.type == "cpu" else None
    return weight is not None and weight.dtype == torch.bfloat16 and fused.available()


def forecast_loss(kind: str, predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Stage 1 loss of one unit on [B, N, d]: the paper's L1 + cosine, the published code's SmoothL1, or MSE."""
    predicted, target = predicted.float(), target.float()
    if valid is not None:
        predicted, target = predicted[valid], target[valid]
    if kind == "smooth-l1":
        return F.smooth_l1_loss(predicted, target)
    if kind == "mse":
        return F.mse_loss(predicted, target)
    cosine = 1 - F.cosine_similarity(predicted, target, dim=-1).mean()
    return F.l1_loss(predicted, target) + cosine
