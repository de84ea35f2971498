"""Arithmetic of a training step, counted by hand on a small model."""

from __future__ import annotations

import pytest
import torch
from tests.routed import make_routed

from informed_routing.config.recipe import ObjectiveConfig
from informed_routing.training.throughput import flops_per_token, throughput

CONTEXT = 9.0


def test_flops_of_each_stage() -> None:
    model = make_routed("llama")
    costs, head = model.costs, model.get_output_embeddings().weight.numel()
    # hidden 64, FFN 128, 4 heads of 16 (2 for keys): weights of a layer, and two products for each key.
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64 * CONTEXT
    dense, routers, forecasters = 3 * layer, 6 * (64 * 8 + 8 * 2), 6 * 2 * 64 * 8
    assert flops_per_token(costs, head, CONTEXT, "forecast") == 2 * dense + 6 * forecasters
    route = 4 * (dense + head) + 6 * routers + 4 * forecasters
    assert flops_per_token(costs, head, CONTEXT, "route") == route
    assert flops_per_token(costs, head, CONTEXT, "route", train_forecasters=True) == route + 2 * forecasters
    distilled = flops_per_token(costs, head, CONTEXT, "route", objective=ObjectiveConfig(kind="distill"))
    assert distilled == route + 2 * (dense + head)
    assert flops_per_token(costs, head, CONTEXT, "lora", adapter_weights=10) == 4 * (dense + head) + 60
    skipping = flops_per_token(costs, head, CONTEXT, "lora", sparsity=0.5)
    kept = dense - 0.5 * 3 * (layer - 64 * 32 * 2 - 2 * 2 * 64 * 8) + routers
    assert skipping == pytest.approx(4 * (kept + head))


def test_mfu_is_a_share_of_a_named_peak() -> None:
    found = throughput(10, 4000, 2.0, 1e6, torch.device("cpu"), torch.float32)
    assert found["steps_per_second"] == 5
    assert found["tokens_per_second"] == 2000
    assert found["mfu"] == pytest.approx(2e9 / found["peak_flops"])
    assert found["peak_from"] == "timed product"
    assert throughput(0, 0, 0.0, 1e6, torch.device("cpu"), torch.float32) == {}
