"""Costs from a configuration alone: models without weights, on the meta device."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..errors import InputError
from .footprint import footprint
from .sliced import reshape_sliced

Measure = Literal["slice", "parameters", "body"]
"""What a SliceGPT sparsity is a share of: the hidden width, all parameters, or those of the decoder layers."""


def empty_model(config: PretrainedConfig) -> Any:
    """A model of this configuration (which is copied) on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def realised_share(config: PretrainedConfig, width: int, measure: Measure) -> float:
    """The share, in the given measure, that slicing a dense configuration to `width` removes (may be negative)."""
    if measure == "slice":
        return 1 - width / config.hidden_size
    dense, sliced = empty_model(config), empty_model(config)
    reshape_sliced(sliced, width)
    name = "parameters" if measure == "parameters" else "body_parameters"
    before, after = (getattr(footprint(model, 1), name) for model in (dense, sliced))
    return 1 - after / before


def width_for(config: PretrainedConfig, sparsity: float, measure: Measure, round_to: int) -> int:
    """The width to slice to: a multiple of `round_to`, or the whole width at sparsity 0.

    It is the largest that removes at least this share. Of parameters, what shortcuts add, and a head that was tied, is
    counted against the share. Raises InputError for a share that no width reaches.
    """
    if sparsity == 0:
        return config.hidden_size
    # What is removed falls with the width: find the last multiple that still removes enough.
    low, high = 0, (config.hidden_size - 1) // round_to
    while low < high:
        middle = (low + high + 1) // 2
        # A share such as 0.4 has no exact binary form: do not go a multiple lower for it.
        if realised_share(config, middle * round_to, measure) >= sparsity - 1e-9:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise InputError(f"no sliced width removes {sparsity:.0%} ({measure})", "Choose a lower sparsity")
    return low * round_to
