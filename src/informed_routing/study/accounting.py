"""What a cell really saves: parameters, arithmetic and cache, in the same units for routed, pruned and dense models."""

from __future__ import annotations

from typing import Any

from ..baselines.footprint import footprint


def accounting(model: Any, shares: dict[str, float] | None = None) -> dict[str, Any]:
    """Costs of a model as it is, and the shares of the dense model's that it saves.

    `shares` is what `routing_stats()` says of a routed model's evaluation, None for other models. The body is the
    decoder layers. MACs of a routed model are those of the evaluated text, of a pruned one those of a token with the
    mean context of the calibration rows. A negative share means that routers, forecasters or shortcuts cost more than
    was saved. KV bytes are those that the cache grows by with each token, in the model's format.
    """
    size = next(model.parameters()).element_size()
    report = getattr(model, "prune_report", None)
    if report is not None:
        saved = report.saved()
        return {
            "measure": report.measure,
            "realised": report.realised,
            "parameters": report.after.parameters,
            "parameters_saved": saved["parameters"],
            "body_parameters_saved": saved["body_parameters"],
            "macs_saved": saved["macs"],
            "kv_bytes_per_token": report.after.kv_bytes(size),
            "kv_saved": saved["kv_elements"],
        }
    if not hasattr(model, "routing_config"):
        found = footprint(model, 1)
        return _whole(found.parameters, 0, found.kv_bytes(size))
    extra = sum(parameter.numel() for _, parameter in model.routing_parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    cache = sum(cost.kv for cost in model.costs) * size
    if shares is None or not shares["units"]:
        return _whole(everything - extra, 0, cache)
    evicted = float(shares.get("kv", 0.0))
    return {
        **_whole(everything - extra, extra, cache * (1 - evicted)),
        "realised": shares["units"],
        "macs_saved": shares["macs"],
        "kv_saved": evicted,
    }


def _whole(parameters: int, extra: int, cache: float) -> dict[str, Any]:
    """A model of which nothing was removed, with `extra` parameters added."""
    return {
        "measure": "units",
        "realised": 0.0,
        "parameters": parameters + extra,
        "parameters_saved": -extra / parameters,
        "body_parameters_saved": 0.0,
        "macs_saved": 0.0,
        "kv_bytes_per_token": cache,
        "kv_saved": 0.0,
    }
