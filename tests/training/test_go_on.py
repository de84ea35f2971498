"""A joint training that goes on with the adapter and routers of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from informed_routing.config.recipe import Recipe
from informed_routing.errors import InputError
from informed_routing.training.fit import fit


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora" / "adapter_model.safetensors")


def test_a_joint_training_goes_on_where_another_ended(recipe: Recipe, tmp_path: Path) -> None:
    first = recipe.with_overrides({"stages": ["forecast", "joint"], "lora.rank": 4})
    fit(first, tmp_path / "first")
    still = {"stages": ["joint"], "start": str(tmp_path / "first"), "route.steps": 1}
    zero = {"route.learning_rate": 1e-30, "route.forecaster_learning_rate": 1e-30, "lora.learning_rate": 1e-30}
    fit(first.with_overrides({**still, **zero}), tmp_path / "same")
    before, after = _adapter(tmp_path / "first"), _adapter(tmp_path / "same")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    fit(first.with_overrides(still), tmp_path / "further")
    further = _adapter(tmp_path / "further")
    assert any(not torch.allclose(before[name], further[name], atol=1e-6) for name in before)


def test_another_adapter_or_stage_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    first = recipe.with_overrides({"stages": ["forecast", "joint"], "lora.rank": 4})
    fit(first, tmp_path / "first")
    start = {"start": str(tmp_path / "first")}
    with pytest.raises(InputError, match="has rank 4"):
        fit(first.with_overrides({**start, "stages": ["joint"], "lora.rank": 8}), tmp_path / "wider")
    with pytest.raises(InputError, match="has been through the lora stage"):
        fit(first.with_overrides({**start, "stages": ["route"]}), tmp_path / "route")
