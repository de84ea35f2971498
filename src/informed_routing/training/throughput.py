"""How fast a stage trained: steps and tokens a second, arithmetic, and the share of the device's peak (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..config.recipe import ObjectiveConfig
from ..routing.costs import UnitCost
from ..routing.target import BudgetMeter

# Dense (not sparse) tensor-core peaks in bfloat16 as the data sheets give them, FLOP/s. The first match counts.
PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s, where the figure is from): the data sheet where it is known, else a large product timed here."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS:
            if part in name:
                return peak, "data sheet"
    from ..evaluation.engines import torch_balance

    return 2 * torch_balance(dtype, device.type).macs_per_second, "timed product"


def flops_per_token(
    costs: Sequence[UnitCost],
    head_weights: int,
    context: float,
    stage: Literal["forecast", "route", "lora"],
    *,
    objective: ObjectiveConfig | None = None,
    train_forecasters: bool = False,
    sparsity: float = 0.0,
    adapter_weights: int = 0,
) -> float:
    """FLOP that a stage's arithmetic takes for one token that sees `context` keys on average.

    Frozen weights cost 2 FLOP a MAC forward and 2 backward, trained ones 4 backward; recomputation under activation
    checkpointing is not counted, as is usual for MFU. `sparsity` is the share of units that training really skips,
    all alike; under sampled decisions both branches of every unit run.
    """
    dense = sum(cost.dense(context) for cost in costs)
    routers, approximate, slices = (
        float(sum(getattr(cost, name) for cost in costs)) for name in ("router", "forecaster", "slice")
    )
    forecasters = approximate - slices
    if stage == "forecast":
        return 2 * (dense + slices) + 6 * forecasters
    body = dense
    if sparsity:
        meter = BudgetMeter(list(costs), ["attention", "ffn"] * (len(costs) // 2), "macs", context)
        body *= 1 - float(meter.saved(torch.full((len(costs),), sparsity)))
    total = 4 * (body + head_weights) + 6 * adapter_weights
    if stage == "route":
        total += 6 * routers + (6 if train_forecasters else 4) * forecasters + 4 * slices
    if objective is not None and objective.kind != "lm":  # the teacher
        total += 2 * (dense + head_weights)
    return total


def throughput(
    steps: int, tokens: int, seconds: float, flops: float, device: torch.device, dtype: torch.dtype, processes: int = 1
) -> dict[str, Any]:
    """What is reported of a trained stage; `flops` is for one token, `tokens` counts all processes."""
    if not seconds:
        return {}
    peak, source = peak_flops(device, dtype)
    rate = tokens / seconds
    return {
        "steps_per_second": steps / seconds,
        "tokens_per_second": rate,
        "flops_per_second": rate * flops,
        "mfu": rate * flops / (peak * processes),
        "peak_flops": peak,
        "peak_from": source,
    }
