"""How much each layer or unit matters: the criteria of the static baselines, on calibration rows [n, L] (int64).

Lower means removed first. All leave the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.recipe import ObjectiveConfig
from ..evaluation.perplexity import token_perplexity
from ..models.head import lm_head
from ..models.units import Unit
from ..progress import Progress
from ..training.objectives import next_token_loss
from .dropping import observing, running
from .remaining import UnitName


def block_influence(
    model: Any, rows: Tensor, batch_size: int, progress: Progress, skip_positions: int = 0
) -> dict[int, float]:
    """1 - the mean cosine of a layer's input and output, in float32 (ShortGPT, Eq. 1).

    `skip_positions` leaves out the first tokens of each row: attention sinks have huge norms there.
    """
    totals = torch.zeros(len(model.model.layers), dtype=torch.float64)

    def note(index: int, before: Tensor, after: Tensor) -> None:
        totals[index] += _distance(before[:, skip_positions:], after[:, skip_positions:])

    handles = [
        layer.register_forward_hook(lambda _, given, output, index=index: note(index, given[0], output))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        _read(model, rows, batch_size, progress, "block influence")
    finally:
        for handle in handles:
            handle.remove()
    tokens = rows[:, skip_positions:].numel()
    return {index: float(total) / tokens for index, total in enumerate(totals)}


def unit_distance(model: Any, rows: Tensor, batch_size: int, progress: Progress) -> dict[UnitName, float]:
    """1 - the mean cosine of the residual stream before and after each unit, in float32 (LLM-Drop)."""
    totals: dict[UnitName, float] = {}

    def note(layer: int, unit: Unit, before: Tensor, after: Tensor) -> None:
        totals[layer, unit.kind] = totals.get((layer, unit.kind), 0.0) + _distance(before, after)

    with observing(model, note):
        _read(model, rows, batch_size, progress, "unit similarity")
    return {name: total / rows.numel() for name, total in totals.items()}


def perplexity_without(model: Any, rows: Tensor, batch_size: int, progress: Progress) -> dict[int, float]:
    """Token perplexity of the rows with each layer left out in turn (Shortened-LLaMA, PPL criterion)."""
    progress.stage("perplexity without each layer", len(model.model.layers))
    scores = {}
    for index, layer in enumerate(model.model.layers):
        with running(layer, ()):
            scores[index] = token_perplexity(model, rows, batch_size).token_perplexity
        progress.advance(index + 1)
    return scores


def taylor(model: Any, rows: Tensor, batch_size: int, progress: Progress) -> dict[int, float]:
    """Sum of |w dL/dw| over a layer's weight matrices, L the mean loss of the rows (Shortened-LLaMA, Taylor criterion).

    Gradients of all layers are held at once, in the model's dtype.
    """
    layers, head, objective = model.model.layers, lm_head(model), ObjectiveConfig()
    weights = {index: [p for p in layer.parameters() if p.dim() == 2] for index, layer in enumerate(layers)}
    progress.stage("taylor", len(rows))
    with _gradients_of(model, [weight for group in weights.values() for weight in group]):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(model.device)
            hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
            loss = next_token_loss(hidden, batch, head, objective, reduction="sum")
            (loss / rows[:, 1:].numel()).backward()
            progress.advance(start + len(batch))
        return {index: sum(map(_first_order, group)) for index, group in weights.items()}


def _first_order(weight: nn.Parameter) -> float:
    assert weight.grad is not None
    return float((weight.detach().float() * weight.grad.float()).abs().sum(dtype=torch.float64))


@contextmanager
def _gradients_of(model: nn.Module, wanted: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach these parameters only; afterwards all is as before, without gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    model.eval().requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _distance(before: Tensor, after: Tensor) -> float:
    """Sum over tokens of 1 - cosine of [B, N, d]."""
    cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
    return float((1 - cosine).sum(dtype=torch.float64))


def _read(model: Any, rows: Tensor, batch_size: int, progress: Progress, name: str) -> None:
    """One dense forward of all rows, without the head."""
    was_training = model.training
    model.eval()
    progress.stage(name, len(rows))
    try:
        with torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size].to(model.device)
                model.model(input_ids=batch, use_cache=False)
                progress.advance(start + len(batch))
    finally:
        model.train(was_training)
