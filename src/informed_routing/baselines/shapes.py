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


class SlicedShapes:
    """What slicing a dense configuration removes, by width."""

    def __init__(self, config: PretrainedConfig, measure: Measure) -> None:
        self.config, self.measure = config, measure
        self._dense = self._count(empty_model(config)) if measure != "slice" else config.hidden_size

    def _count(self, model: Any) -> int:
        found = footprint(model, 1)
        return found.parameters if self.measure == "parameters" else found.body_parameters

    def removed(self, width: int) -> float:
        """The share that slicing to `width` removes. Negative if the shortcuts, or an untied head, add more."""
        if self.measure == "slice":
            return 1 - width / self._dense
        model = empty_model(self.config)
        reshape_sliced(model, width)
        return 1 - self._count(model) / self._dense

    def width_for(self, sparsity: float, round_to: int) -> int:
        """The largest multiple of `round_to` that removes at least this share; the whole width at sparsity 0.

        Raises InputError for a share that no width reaches.
        """
        if sparsity == 0:
            return self.config.hidden_size
        # What is removed falls with the width: find the last multiple that still removes enough.
        low, high = 0, (self.config.hidden_size - 1) // round_to
        while low < high:
            middle = (low + high + 1) // 2
            # A share such as 0.4 has no exact binary form: do not go a multiple lower for it.
            if self.removed(middle * round_to) >= sparsity - 1e-9:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise InputError(f"no sliced width removes {sparsity:.0%} ({self.measure})", "Choose a lower sparsity")
        return low * round_to
