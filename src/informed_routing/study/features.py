"""How far routing moves the residual stream from the dense model's, layer by layer (paper Figure 1b)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routing.decision import AlwaysExecute

SIMILAR = 0.95
"""The paper's bound for features that remain highly similar."""

EDGES = torch.linspace(0, 1, 41)
"""Bounds of the histogram; the first bin takes negative cosines, too."""


def feature_similarity(model: Any, rows: Tensor, batch_size: int) -> dict[str, Any]:
    """Cosines of a routed model's hidden states to its own with every token executed, on rows [n, L].

    Compared is the residual stream after each layer, for every token and in float32. `layers` are mean cosines,
    `similar` the share above 0.95 of all (token, layer) pairs, `similar_layers` that of each layer, and `histogram` the
    shares of the bins between `edges`. Adapters that are merged are part of both models.
    """
    layers = model.decoder.layers
    sums, above = torch.zeros(len(layers), dtype=torch.float64), torch.zeros(len(layers), dtype=torch.float64)
    counts = torch.zeros(len(EDGES) - 1, dtype=torch.float64)
    tokens = 0
    try:
        # Engines do not show layers one by one.
        with model.routing_state.using(native=None), torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                ids = rows[start : start + batch_size].to(model.device)
                routed = _streams(model, ids)
                with model.deciding(AlwaysExecute()):
                    dense = _streams(model, ids)
                tokens += ids.numel()
                for index, (one, other) in enumerate(zip(routed, dense, strict=True)):
                    cosine = F.cosine_similarity(one.float(), other.float(), dim=-1).flatten().cpu()
                    sums[index] += cosine.double().sum()
                    above[index] += (cosine > SIMILAR).sum()
                    places = torch.bucketize(cosine.clamp(0, 1), EDGES, right=True).clamp(1, len(EDGES) - 1) - 1
                    counts += torch.bincount(places, minlength=len(counts)).double()
    finally:
        model.reset_routing_stats()
    return {
        "tokens": tokens,
        "layers": (sums / tokens).tolist(),
        "similar": float(above.sum() / (tokens * len(layers))),
        "similar_layers": (above / tokens).tolist(),
        "edges": EDGES.tolist(),
        "histogram": (counts / counts.sum()).tolist(),
    }


def _streams(model: Any, ids: Tensor) -> list[Tensor]:
    """The residual stream [B, N, d] after each layer."""
    kept: list[Tensor] = []

    def keep(_module: Any, _arguments: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in model.decoder.layers]
    try:
        model.decoder(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept
