"""Tiny routed models whose routers and forecasters are random but matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny import make_tiny, random_ids

from informed_routing.baselines.dynamic import attach
from informed_routing.config.folder import RoutingConfig, ThresholdRow
from informed_routing.config.parts import ForecasterConfig, RouterConfig
from informed_routing.execution.cpu import build
from informed_routing.routed_model import RoutedModelForCausalLM


def make_routed(
    family: str = "llama",
    *,
    fallback: str = "forecaster",
    router: str = "low-rank",
    seed: int = 0,
    forecaster: dict[str, Any] | None = None,
    **overrides: Any,
) -> RoutedModelForCausalLM:
    """A tiny routed model with random routers (margins of both signs) and random forecasters."""
    model = RoutedModelForCausalLM.attach(
        make_tiny(family, seed=seed, **overrides),
        ForecasterConfig(rank=8, fallback=fallback, **(forecaster or {})),
        RouterConfig(kind=router, width=None if router == "linear" else 8),  # type: ignore[arg-type]
    )
    return _randomised(model, seed + 1)


def make_baseline(name: str, *, seed: int = 0, **overrides: Any) -> RoutedModelForCausalLM:
    """A tiny Llama of 4 layers with the parts of a dynamic baseline's recipe, its routers random."""
    settings = {"num_hidden_layers": 4, **overrides}
    return _randomised(attach(make_tiny("llama", seed=seed, **settings), name), seed + 1)


def _randomised(model: RoutedModelForCausalLM, seed: int) -> RoutedModelForCausalLM:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for unit in model.units:
            for name, parameter in unit.named_parameters():
                if "norm" in name:
                    continue
                std = 0.1 if name.endswith("bias") else 1.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def left_padded(ids: torch.Tensor, pads: tuple[int, ...]) -> torch.Tensor:
    """Attention mask [B, N] with `pads[i]` masked tokens at the left of row i."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return mask


def execute(model: RoutedModelForCausalLM, execution: Any, policy: Any = "exact", weights: Any = None) -> None:
    """Choose how units are computed; the test is skipped where the native engine cannot be built."""
    if execution == "native" and build.compiler() is None:
        pytest.skip("no C++ compiler")
    model.set_execution(execution, policy=policy, weights=weights)


def threshold_row(share: float, threshold: float, **columns: Any) -> ThresholdRow:
    """A calibrated point that realised the same share of everything."""
    shares = dict.fromkeys(("units", "attention", "ffn", "macs"), share)
    return ThresholdRow(threshold=threshold, **shares, **columns)


def with_table(model: RoutedModelForCausalLM, *rows: ThresholdRow) -> RoutingConfig:
    """The settings of a model that got this table, calibrated in units on 32 tokens."""
    model.with_thresholds(rows, "units", 0.2, 32)
    return model.routing_config


def gates_of(model: Any, call: Callable[[], Any]) -> torch.Tensor:
    """What a call decides: bool [units, B, N]."""
    with torch.inference_mode():
        call()
    found = model.routing_state.forward.gates
    return torch.stack([found[i] for i in range(len(model.units))])


def decided_with_a_cache(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Gates [units, B, N] of ids [B, N] given in parts, at last one by one, and the cache that they left."""
    cache: Any = None
    parts = []

    def give(low: int, high: int) -> None:
        nonlocal cache
        cache = model(ids[:, low:high], past_key_values=cache, use_cache=True).past_key_values

    for low, high in ((0, 2), (2, 11), *((i, i + 1) for i in range(11, ids.shape[1]))):
        parts.append(gates_of(model, lambda low=low, high=high: give(low, high)))  # type: ignore[misc]
    return torch.cat(parts, dim=2), cache


def together_and_alone(model: Any, ids: torch.Tensor, pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [units, N] of the second of two sequences, the first `pads` tokens of which are padding; and alone."""
    mask = left_padded(ids, (0, pads))
    together = gates_of(model, lambda: model(ids, attention_mask=mask))
    alone = gates_of(model, lambda: model(ids[1:, pads:]))
    assert not together[:, 1, :pads].any()
    return together[:, 1, pads:], alone[:, 0]


def logits_and_stats(rule: Callable[[RoutedModelForCausalLM], Any], execution: str) -> tuple[torch.Tensor, Any]:
    """Logits of the real tokens of a padded batch, and what was counted, under a rule for the model."""
    ids = random_ids(3, 30)
    mask = left_padded(ids, (0, 4, 11))
    model = make_routed("llama")
    execute(model, execution)
    model.set_decision(rule(model))
    with torch.inference_mode():
        assert model.runs_native is (execution == "native")
        logits = model(ids, attention_mask=mask).logits
    return logits[mask.bool()], model.routing_stats()
