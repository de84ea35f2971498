"""Fits of the dynamic baselines' own recipes, cut to a second on a tiny model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from informed_routing.baselines.dynamic import recipe_of
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.fit import fit

SHORT: dict[str, Any] = {
    "dtype": "float32",
    "route.steps": 6,
    "route.batch_size": 2,
    "route.sequence_length": 32,
    "route.sparsity": 0.2,
    "lora.steps": 3,
    "lora.batch_size": 2,
    "lora.sequence_length": 32,
    "calibration.tokens": 1024,
    "calibration.sequence_length": 32,
    "calibration.targets": [0.1, 0.2],
}


def fitted(name: str, model: Path, text: Path, out: Path) -> RoutedModelForCausalLM:
    """The model of the folder that a short fit of a baseline's recipe leaves, at its sparsity."""
    fit(recipe_of(name).with_overrides({**SHORT, "model": str(model), "data": [str(text)]}), out)
    return RoutedModelForCausalLM.from_pretrained(out)


def check_usable(model: RoutedModelForCausalLM, method: str) -> None:
    """The stored dial works: dense, scored at the sparsity it was fitted for, and generating by the causal rule."""
    assert model.routing_config.method == method
    assert model.routing_config.sparsity == 0.2
    ids = torch.randint(3, 120, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)
        assert abs(model.routing_stats()["units"] - 0.2) < 0.1
        model.set_sparsity(0.2, decision="threshold")
        model(ids)
    assert abs(model.routing_stats()["units"] - 0.2) < 0.1
    assert model.generate(ids[:1], max_new_tokens=4, eos_token_id=None).shape == (1, 36)
